/*-------------------------------------------------------------------------
 *
 * risky_migrations.c
 *	  Changing a column's type without the outage.
 *
 * Words, used everywhere:
 *
 *	migration	one requested change of one column's type on one table
 *	method		how: direct (plain ALTER TABLE) or three_step (shadow column)
 *	step		a part of a method, run, resumed and taken back on its own
 *	batch		rows that are counted and reported together; a step commits
 *				at least once for each
 *	sync		the trigger that carries concurrent writes over
 *	probe		a background worker that runs one query again and again and
 *				records each latency
 *	lab			two tables and five numbered migrations of them, to see it all
 *
 * The way of a call; arrows point one way only:
 *
 *	steer.c, surface.c, lab.c, check.c
 *						procedures and functions: arguments, refusals
 *	choose.c			which method, and what ALTER TABLE would do
 *	migration.c			the state row, and the ground it stands on
 *	direct.c, three_step.c, backfill.c, swap.c
 *						the methods: lists of steps
 *	runner.c			the step runner: transactions, waits, the step log
 *	throttle.c			rests between its transactions, for the sake of others
 *	crew.c				helpers beside the runner, on ranges of pages
 *	rows.c, conversion.c, dependents.c, twin.c, locks.c, state.c
 *						rows of a page, the expression, what hangs on a column,
 *						an empty copy to try things on, locks, our own tables
 *
 * Beside it stand sync_trigger.c, which runs in the writers' sessions, and
 * worker.c, probe.c and launcher.c, which run in background workers (as steer.c
 * can).  Reports are SQL over
 * the step log, in the install script.  compat.h knows the versions of
 * PostgreSQL.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "crew.h"
#include "fmgr.h"
#include "locks.h"
#include "risky_migrations.h"
#include "steer.h"
#include "throttle.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;

void		_PG_init(void);

int			rm_lock_timeout = 250;
int			rm_lock_retries = 50;
int			rm_lock_retry_max_delay = 10000;
int			rm_max_row_lock_time = 25;
int			rm_workers = 1;
int			rm_range_pages = 0;
int			rm_snapshot_timeout = 3600000;
bool		rm_accept_publications = false;
bool		rm_compress_wal = true;
bool		rm_verify_while_busy = true;
bool		rm_recreate_matviews = false;
int			rm_end_blockers_after = 0;
int			rm_launcher_interval = 60;

void
_PG_init(void)
{
	/*
	 * How long others may have to queue behind a lock that we ask for.  There
	 * is no "for ever": zero is refused.
	 */
	DefineCustomIntVariable("risky_migrations.lock_timeout",
							"Longest wait for a lock in one try.",
							"After it the migration lets everybody through and tries again.",
							&rm_lock_timeout, 250, 10, 60000, PGC_USERSET,
							GUC_UNIT_MS, NULL, NULL, NULL);

	/* after so many further tries the step fails; nothing is lost, call again */
	DefineCustomIntVariable("risky_migrations.lock_retries",
							"Number of further tries for a lock before a step gives up.",
							NULL, &rm_lock_retries, 50, 0, INT_MAX, PGC_USERSET, 0,
							NULL, NULL, NULL);

	/* pauses between tries double from 50 ms up to this, with jitter */
	DefineCustomIntVariable("risky_migrations.lock_retry_max_delay",
							"Longest pause between two tries for a lock.", NULL,
							&rm_lock_retry_max_delay, 10000, 1, 3600000, PGC_USERSET,
							GUC_UNIT_MS, NULL, NULL, NULL);

	/*
	 * A writer that wants a row which the backfill has just changed waits for
	 * that transaction's end, so the backfill commits this often.
	 */
	DefineCustomIntVariable("risky_migrations.max_row_lock_time",
							"How long the backfill may hold a row locked.",
							"It commits at least this often, and at least once a batch.",
							&rm_max_row_lock_time, 25, 1, 60000, PGC_USERSET,
							GUC_UNIT_MS, NULL, NULL, NULL);

	/*
	 * Each takes a processor and writes WAL as fast as it can, and one of
	 * max_worker_processes; so more than one only where somebody asks for it.
	 */
	DefineCustomIntVariable("risky_migrations.workers",
							"Processes that work on the backfill, the copy and the verification.",
							"With more than one, helpers are background workers, as many as are free.",
							&rm_workers, 1, 1, RM_MAX_WORKERS, PGC_USERSET, 0,
							NULL, NULL, NULL);

	/* for tests, so that small tables are shared out too */
	DefineCustomIntVariable("risky_migrations.range_pages",
							"Pages that each range of several workers has a multiple of.",
							"0 is what the step finds worth while.",
							&rm_range_pages, 0, 0, INT_MAX, PGC_USERSET,
							GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE,
							NULL, NULL, NULL);

	/*
	 * Before the columns change places, snapshots that are older than the last
	 * batch are waited out, without holding anything.
	 */
	DefineCustomIntVariable("risky_migrations.snapshot_timeout",
							"How long the swap waits for older snapshots.",
							"After it the step fails; nothing is lost, call it again.",
							&rm_snapshot_timeout, 3600000, 100, INT_MAX, PGC_USERSET,
							GUC_UNIT_MS, NULL, NULL, NULL);

	/* only clients' sessions that the role may end, never a superuser's */
	DefineCustomIntVariable("risky_migrations.end_blockers_after",
							"Ends sessions that keep a lock from being had for this long.",
							"0 means never.",
							&rm_end_blockers_after, 0, 0, INT_MAX, PGC_USERSET,
							GUC_UNIT_MS, NULL, NULL, NULL);

	/* a subscriber without the shadow column stops at the first row */
	DefineCustomBoolVariable("risky_migrations.accept_publications",
							 "Accepts that the table is published, new column included.",
							 "Only where the subscribers have the new column already.",
							 &rm_accept_publications, false, PGC_USERSET, 0,
							 NULL, NULL, NULL);

	/* what they show afterwards is as new as after a REFRESH, which not all may want */
	DefineCustomBoolVariable("risky_migrations.recreate_matviews",
							 "Makes materialized views on the column again, and fills them.",
							 "They are filled beside their readers, before the columns change places.",
							 &rm_recreate_matviews, false, PGC_USERSET, 0,
							 NULL, NULL, NULL);

	/* who may not set wal_compression can turn this off, and nothing else */
	DefineCustomBoolVariable("risky_migrations.compress_wal",
							 "Compresses the pages that steps write to the WAL whole.",
							 "With lz4, where the server has it and wal_compression is off.",
							 &rm_compress_wal, true, PGC_USERSET, 0,
							 NULL, NULL, NULL);

	/* else all of it is done when the shadow is complete, which takes longer */
	DefineCustomBoolVariable("risky_migrations.verify_beside",
							 "Verifies while online_rewrite copies and builds indexes.",
							 "By helpers, background workers, as long as a processor has nothing else to do.",
							 &rm_verify_while_busy, true, PGC_USERSET, 0,
							 NULL, NULL, NULL);

	rm_throttle_init();
	/* with the library in shared_preload_libraries only, see launcher.c */
	DefineCustomIntVariable("risky_migrations.launcher_interval",
							"Time between two looks for background migrations that were interrupted.",
							"Also at the start of the server, and when the configuration is reloaded.",
							&rm_launcher_interval, 60, 1, 86400, PGC_SIGHUP,
							GUC_UNIT_S, NULL, NULL, NULL);

	MarkGUCPrefixReserved("risky_migrations");
	rm_locks_init();
	rm_launcher_init();
}
