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
	Oid			relid;			/* 0: others' transactions, waited for */
	char	   *relation;		/* qualified name when the lock was held */
	const char *role;			/* table, new table, index, toast table, ... */
	LOCKMODE	mode;
	bool		explicit;		/* asked for by rm_lock_relation() */
	bool		rewritten;		/* storage was replaced while it was held */
	bool		harmless;		/* on something that nobody else uses */
	double		wait_ms;		/* longest wait, -1 if not known */
	double		hold_ms;		/* longest hold */
	bool		bound;			/* which is an upper bound */
	int64		times;			/* transactions that held it */
	/* of the transaction under way */
	bool		current;
	bool		current_bound;	/* when it was taken is not known */
	bool		seen;			/* found when the lock table was last read */
	instr_time	acquired;
} RmLockStat;

/* one of them as another process tells of it */
typedef struct RmLockNote
{
	Oid			relid;
	LOCKMODE	mode;
	bool		bound;
	bool		rewritten;
	bool		harmless;
	double		wait_ms;
	double		hold_ms;
	char		role[16];
	char		relation[4 * NAMEDATALEN + 6];
} RmLockNote;

/* the locks of a statement that goes through transactions of its own */
typedef struct RmLockNotes
{
	Oid			relid;			/* to be locked before it, or 0 */
	Oid			target;			/* the migration's table */
	int			size;
	int			n;
	int			left_off;		/* for which there was no room */
	RmLockNote	notes[FLEXIBLE_ARRAY_MEMBER];
} RmLockNotes;

/* the locks of a step; lives in one memory context across transactions */
typedef struct RmLockAccount
{
	MemoryContext cxt;
	List	   *stats;			/* of RmLockStat */
	struct HTAB *index;			/* of them, by relation and mode */
	List	   *held;			/* those of the transaction under way */
	instr_time	xact_start;		/* bound for locks taken inside statements */
	bool		strong;			/* a set of locks that block writers was taken */
	instr_time	strong_from;	/* then; before, no such lock was held at all */
	bool		blocking;		/* a lock of this transaction blocks writers */
	bool		queued;			/* and somebody may stand behind it */
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

extern void rm_lock_watch(RmLockNotes *notes);
extern void rm_lock_watch_end(void);
extern void rm_lock_notes_add(RmLockAccount *account, const RmLockNotes *notes);
extern void rm_lock_note_wait(RmLockAccount *account, double wait_ms);

extern void rm_lock_bound_waits(void);
extern void rm_lock_yield_in_deadlocks(void);
extern bool rm_lock_relation_if_there(RmLockAccount *account, Oid relid,
									  LOCKMODE mode);
extern void rm_lock_relation(RmLockAccount *account, Oid relid, LOCKMODE mode);
extern void rm_lock_relations(RmLockAccount *account, List *relids, LOCKMODE mode,
							  int tries);
extern void rm_lock_check_room(const char *method, Oid relid, List *columns, int64 migration_id);
extern List *rm_lock_blocking_pids(RmLockAccount *account);
extern List *rm_relation_marks(List *relids);
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
