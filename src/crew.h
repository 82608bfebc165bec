/*-------------------------------------------------------------------------
 *
 * crew.h
 *	  Several processes for one step, on disjoint ranges of pages.
 *
 * What a step has to do to use it:
 *
 *	- in apply, with the table locked, once: rm_ranges_cut().  From then on
 *	  m->ranges is not 0, until rm_ranges_forget();
 *	- in apply, while m->ranges is not 0: rm_range_take(); if that has taken
 *	  one, one transaction's worth of work on run->range, and rm_range_save();
 *	  and run->helpers, the number of helpers that it could do with;
 *	- a function help, which does the same transaction's worth of work in a
 *	  helper.  What it needs of the state row is in run->m, a copy that is not
 *	  saved.
 *
 * Or, where helpers do something else than apply, which goes on by itself: run->aside,
 * run->helpers, and rm_ranges_offer() as there is something to do for them; rm_ranges_forget()
 * before anything that must not happen beside them, for those that an earlier run has left.
 *
 * The rest (processes, errors, throttling, steering, sums) is done here and by
 * the runner.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_CREW_H
#define RM_CREW_H

#include "migration.h"

/* most processes that work on one step, its runner included */
#define RM_MAX_WORKERS 16

/* what has come of looking for something to do */
typedef enum RmRangeTaken
{
	RM_RANGE_TAKEN,				/* run->range is ours in this transaction */
	RM_RANGE_NONE_FREE,			/* others work on all that is left */
	RM_RANGE_ALL_DONE
} RmRangeTaken;

/* ranges; need SPI, in a transaction of the step */
/* how often to look whether the others have done the rest, in ms */
#define RM_LOOK_AT_OTHERS 20

extern int	rm_workers_for(int64 blocks, int multiple_of);
extern int	rm_helpers_aside_for(int64 blocks, int multiple_of);
extern void rm_ranges_cut(RmRun *run, Oid relid, int workers, int multiple_of);
extern void rm_ranges_offer(RmRun *run, Oid relid, int64 first_block, int64 end_block,
							int multiple_of);
extern void rm_ranges_forget(RmMigration *m);
extern RmRangeTaken rm_range_take(RmRun *run);
extern void rm_range_wait(RmRun *run);
extern void rm_range_save(RmRun *run);
extern void rm_range_whole(RmRun *run);
extern const RmRangeSums *rm_ranges_sum(RmRun *run, bool now);

/* the crew, for the runner: between two transactions */
extern ErrorData *rm_crew_tend(RmRun *run);
extern void rm_crew_hold(RmRun *run);
extern void rm_crew_dismiss(RmRun *run);
extern RmCrewSums rm_crew_sums(const RmRun *run);
extern int	rm_crew_size(const RmRun *run);

/* the same in a helper */
extern bool rm_crew_may_go_on(RmRun *run, bool idle, ErrorData **error);
extern void rm_crew_publish(RmRun *run);

#endif							/* RM_CREW_H */
