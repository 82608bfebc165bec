/*-------------------------------------------------------------------------
 *
 * locks.h
 *	  Locks with a bounded wait, and an honest account of them.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_LOCKS_H
#define RM_LOCKS_H

#include "nodes/pg_list.h"
#include "portability/instr_time.h"
#include "storage/lock.h"

/* one lock of a step on one relation: the longest of its transactions */
typedef struct RmLockStat
{
	Oid			relid;
	char	   *relation;		/* qualified name when the lock was held */
	const char *role;			/* table, new table, index, toast table, ... */
	LOCKMODE	mode;
	bool		explicit;		/* taken by rm_lock_relation: times are exact */
	bool		rewritten;		/* storage was replaced while it was held */
	bool		is_new;			/* on a table that nobody else knows yet */
	double		wait_ms;		/* longest wait, -1 if not known */
	double		hold_ms;		/* longest hold or its upper bound */
	int64		times;			/* transactions that held it */
	/* of the transaction under way */
	bool		current;
	instr_time	acquired;
} RmLockStat;

/* the locks of a step; lives in one memory context across transactions */
typedef struct RmLockAccount
{
	MemoryContext cxt;
	List	   *stats;			/* of RmLockStat */
	instr_time	xact_start;		/* bound for locks taken inside statements */
	bool		blocking;		/* a lock of this transaction blocks writers */
	bool		complete;		/* the lock table has been read for these modes */
	Oid			vacuumed;		/* not asked for: see rm_lock_relation() */
	int			set_size;		/* relations that are needed together */
	bool		missed;			/* one of them was not free when another was held */
	Oid			waited_for;		/* which to wait for, so that the rest falls free */
} RmLockAccount;

extern void rm_locks_init(void);

extern void rm_lock_account_begin(RmLockAccount *account);
extern void rm_lock_account_collect(RmLockAccount *account, Oid relid,
									List *old_storage);
extern void rm_lock_account_end(RmLockAccount *account);
extern List *rm_relation_storage(Oid relid);

extern void rm_lock_bound_waits(void);
extern void rm_lock_yield_in_deadlocks(void);
extern void rm_lock_relation(RmLockAccount *account, Oid relid, LOCKMODE mode);
extern void rm_lock_relations(RmLockAccount *account, List *relids, LOCKMODE mode,
							  int tries);
extern List *rm_lock_blocking_pids(RmLockAccount *account);
extern char *rm_lock_blockers(Oid relid, LOCKMODE mode);
extern int	rm_wraparound_vacuum(Oid relid);

/* who runs what: session-level locks that no SQL function can take */
typedef enum RmRunnerLock
{
	RM_RUNNER_MIGRATION = 3,	/* of one migration, by its id */
	RM_RUNNER_PROBE = 4,		/* held by a living probe, by its id */
	RM_RUNNER_LAB = 5,			/* of the lab in one schema, by its OID */
	RM_SEEDING = 6				/* whoever fills the lab, likewise */
} RmRunnerLock;

extern bool rm_runner_lock(RmRunnerLock kind, int64 id, int *holder_pid);
extern bool rm_transaction_lock(RmRunnerLock kind, int64 id);
extern bool rm_runner_lock_held(RmRunnerLock kind, int64 id);
extern void rm_runner_unlock(RmRunnerLock kind, int64 id);
extern int	rm_runner_pid(RmRunnerLock kind, int64 id);

#endif							/* RM_LOCKS_H */
