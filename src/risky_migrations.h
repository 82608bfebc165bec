/*-------------------------------------------------------------------------
 *
 * risky_migrations.h
 *	  Settings and what every file needs.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RISKY_MIGRATIONS_H
#define RISKY_MIGRATIONS_H

/* settings risky_migrations.*, described in risky_migrations.c */
extern int	rm_lock_timeout;	/* milliseconds */
extern int	rm_lock_retries;
extern int	rm_lock_retry_max_delay;	/* milliseconds */
extern int	rm_max_row_lock_time;	/* milliseconds */
extern int	rm_workers;		/* processes for one step, the runner included */
extern int	rm_range_pages; /* of a range of them; 0: as the step wants it */
extern int	rm_snapshot_timeout;	/* milliseconds */
extern bool rm_accept_publications;
extern bool rm_compress_wal;
extern bool rm_verify_while_busy;
extern bool rm_recreate_matviews;
extern int	rm_end_blockers_after;	/* milliseconds, 0: never */

extern int	rm_launcher_interval;	/* seconds */

/* batches: rows, the largest that makes sense and the default */
#define RM_DEFAULT_BATCH 100000
#define RM_MAX_BATCH 10000000

#endif							/* RISKY_MIGRATIONS_H */
