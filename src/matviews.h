/*-------------------------------------------------------------------------
 *
 * matviews.h
 *	  Materialized views on the column: filled again beside their readers.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_MATVIEWS_H
#define RM_MATVIEWS_H

#include "migration.h"

/* a materialized view, or a view below one: a row of column_copies() */
typedef struct RmCopy
{
	char	   *name;
	Oid			relid;			/* the one in force */
	char	   *copy_name;		/* of the one that waits */
	char	   *aside_sql;
	List	   *make_sql;		/* of char *, like the others */
	List	   *wait_sql;
	char	   *fill_sql;		/* NULL: nothing is to be filled */
	List	   *take_sql;		/* puts the copy in force, once the other is gone */
	char	   *state;
} RmCopy;

/* memory across the transactions of a run */
typedef struct RmCopies
{
	char	   *state;			/* of the originals, when the copies were made */
	int			made;			/* how often */
	const char *filling;		/* the one that is being filled, or NULL ... */
	char	   *fill_sql;
	char	   *analyze_sql;
} RmCopies;

extern List *rm_copies_wanted(const RmMigration *m, bool forward);
extern const RmCopy *rm_copy_of(List *copies, Oid relid);
extern List *rm_copies_there(const RmMigration *m, bool forward);
extern bool rm_copies_lock(RmRun *run, bool forward);
extern void rm_copies_make(RmRun *run, RmCopies *copies, bool forward);
extern bool rm_copies_choose(RmRun *run, RmCopies *copies, bool forward);
extern void rm_copies_fill(RmRun *run, RmCopies *copies);
extern bool rm_copies_good(const RmMigration *m, const RmCopies *copies, bool forward);
extern void rm_copies_rehearse(RmMigration *m, List *wanted);

#endif							/* RM_MATVIEWS_H */
