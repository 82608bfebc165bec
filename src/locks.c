/*-------------------------------------------------------------------------
 *
 * locks.c
 *	  Locks with a bounded wait, and an honest account of them.
 *
 * Everybody who comes after a waiting ACCESS EXCLUSIVE request waits behind
 * it, so what matters is not only how long a lock is held but how long it is
 * asked for.  Each transaction of a step calls rm_lock_bound_waits() first:
 * every lock it then waits for, also inside a statement and for a row, gives
 * up after risky_migrations.lock_timeout, with deadlock_timeout set below
 * that (an ordinary autovacuum yields only when the waiter's deadlock check
 * runs).  The step runner rolls the transaction back, pauses and tries again.
 *
 * Nobody is waited for while something is held: of several relations the first
 * is waited for, and the others must fall free.  If they do not, all are let go,
 * at once and not with the transaction's end, so that a try has many turns.  No
 * deadlock can come of it, for whoever holds something is not in a queue.
 *
 * There must be room for them all in the server's lock table, beside what others hold
 * (rm_lock_check_room()).
 *
 * The account says what a step really held.  Four sources, in this order:
 *
 *	rm_lock_relation() stamps the time before and after it waits, and a
 *	resource release callback stamps the moment at which the transaction's
 *	locks are gone (AFTER_LOCKS): wait and hold are exact.
 *
 *	rm_lock_account_collect() reads our own entries from the lock table just
 *	before commit: all modes that statements took inside themselves.  For
 *	those the hold is an upper bound (since the transaction began, or since the
 *	set of strong locks was there that came before all others), the wait
 *	is not known, and both are marked so.
 *
 *	rm_lock_watch() does the same in a worker, whose statement commits in its
 *	middle: it takes the table's lock for the session, stamped, and reads the
 *	lock table before each of those commits.  Whom CREATE INDEX CONCURRENTLY
 *	waits for, one virtual transaction after the other, leaves no trace there:
 *	the starter looks at the worker meanwhile (worker.c).
 *
 *	File numbers before and after tell whether storage was rewritten.
 *
 * Easy to get wrong: the release happens after the last moment at which the
 * transaction could write it down, so holds are reported by the next one; and
 * catalogs and the extension's own tables are left out, since no user of the
 * table waits for them.  So is what the transaction itself has made, but for the
 * tables of a step that makes tables: the log is to tell of every step.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/twophase.h"
#include "access/xact.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/pg_attribute.h"
#include "catalog/pg_class.h"
#include "catalog/pg_default_acl.h"
#include "catalog/pg_depend.h"
#include "catalog/pg_description.h"
#include "catalog/pg_index.h"
#include "catalog/pg_statistic_ext.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "common/pg_prng.h"
#include "compat.h"
#include "locks.h"
#include "migration.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "risky_migrations.h"
#include "state.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

/*
 * While some relations of a set are held, another one is looked at for so long;
 * at most so long others pass before the next turn, milliseconds.
 */
#define SET_PATIENCE 10
#define SET_PAUSE 5

/* of the lock table, the part that nobody need ask for: one of so many */
#define SMALL_PART 20

/* storage of one relation: its file number, to be compared later */
typedef struct RelationStorage
{
	Oid			relid;
	Oid			relfilenode;
} RelationStorage;

static bool release_armed = false;
static instr_time release_time;

/* in a worker: what its statement holds, and where to tell it in the end */
static RmLockAccount *watched = NULL;
static RmLockNotes *watched_notes = NULL;

static void collect_watched(XactEvent event, void *arg);

/* stamps the moment at which the transaction's locks have been released */
static void
release_callback(ResourceReleasePhase phase, bool isCommit, bool isTopLevel,
				 void *arg)
{
	if (!isTopLevel || phase != RESOURCE_RELEASE_AFTER_LOCKS)
		return;
	if (release_armed)
	{
		INSTR_TIME_SET_CURRENT(release_time);
		release_armed = false;
	}
	if (watched)
		INSTR_TIME_SET_CURRENT(watched->xact_start);	/* the next one */
}

/* once per process, from _PG_init */
void
rm_locks_init(void)
{
	RegisterResourceReleaseCallback(release_callback, NULL);
	RegisterXactCallback(collect_watched, NULL);
}

static double
ms_between(instr_time from, instr_time to)
{
	INSTR_TIME_SUBTRACT(to, from);
	return INSTR_TIME_GET_MILLISEC(to);
}

/* a transaction of the step begins: nothing is held yet */
void
rm_lock_account_begin(RmLockAccount *account)
{
	ListCell   *lc;

	INSTR_TIME_SET_CURRENT(account->xact_start);
	release_armed = true;
	account->blocking = account->strong = false;
	account->queued = true;		/* as long as nobody has looked */
	account->vacuumed = InvalidOid;
	account->set_size = 1;
	account->missed = false;
	foreach(lc, account->held)
		((RmLockStat *) lfirst(lc))->current = false;
	list_free(account->held);
	account->held = NIL;
}

/* is it a relation whose locks concern others? */
static bool
is_user_relation(Oid relid, Form_pg_class form)
{
	return relid >= FirstNormalObjectId &&
		form->relnamespace != get_namespace_oid(RM_SCHEMA, true);
}

/* made by this very transaction, so that nobody else knows it */
static bool
is_new_relation(Oid relid)
{
	Relation	rel = RelationIdGetRelation(relid);
	bool		result = RelationIsValid(rel) && rel->rd_createSubid != InvalidSubTransactionId;

	if (RelationIsValid(rel))
		RelationClose(rel);
	return result;
}

static const char *
relation_role(Oid relid, Form_pg_class form, Oid target)
{
	switch (form->relkind)
	{
		case RELKIND_INDEX:
		case RELKIND_PARTITIONED_INDEX:
			return "index";
		case RELKIND_TOASTVALUE:
			return "toast table";
		case RELKIND_SEQUENCE:
			return "sequence";
		case RELKIND_VIEW:
		case RELKIND_MATVIEW:
			return "view";
		default:
			return relid == target ? "table" : "other table";
	}
}

/* by what a row of the account is found */
typedef struct StatKey
{
	Oid			relid;
	LOCKMODE	mode;
} StatKey;

typedef struct StatEntry
{
	StatKey		key;
	RmLockStat *stat;
} StatEntry;

/* the row of the account for that relation and mode, NULL if there is none */
static RmLockStat *
find_stat(const RmLockAccount *account, Oid relid, LOCKMODE mode)
{
	StatKey		key = {.relid = relid,.mode = mode};
	StatEntry  *entry;

	if (account->index == NULL)
		return NULL;
	entry = hash_search(account->index, &key, HASH_FIND, NULL);
	return entry ? entry->stat : NULL;
}

/*
 * The same; made if missing.  There may be tens of thousands, of partitions, and they are
 * asked for under strong locks.
 */
static RmLockStat *
stat_for(RmLockAccount *account, Oid relid, LOCKMODE mode)
{
	StatKey		key = {.relid = relid,.mode = mode};
	RmLockStat *stat = find_stat(account, relid, mode);
	MemoryContext oldcxt;

	if (stat)
		return stat;
	oldcxt = MemoryContextSwitchTo(account->cxt);
	if (account->index == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(StatKey),.entrysize = sizeof(StatEntry),
		.hcxt = account->cxt};

		account->index = hash_create("rm locks", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	stat = palloc0(sizeof(RmLockStat));
	stat->relid = relid;
	stat->mode = mode;
	stat->role = "table";
	stat->wait_ms = -1;
	account->stats = lappend(account->stats, stat);
	((StatEntry *) hash_search(account->index, &key, HASH_ENTER, NULL))->stat = stat;
	account->complete = false;
	MemoryContextSwitchTo(oldcxt);
	return stat;
}

/* the transaction under way has that lock, taken just now or (bound) since then at most */
static void
begin_hold(RmLockAccount *account, RmLockStat *stat, instr_time acquired, bool bound)
{
	if (!stat->current)
	{
		MemoryContext oldcxt = MemoryContextSwitchTo(account->cxt);

		account->held = lappend(account->held, stat);
		MemoryContextSwitchTo(oldcxt);
	}
	stat->current = true;
	stat->current_bound = bound;
	stat->acquired = acquired;
}

/*
 * File numbers of a table, its indexes and its TOAST table, as a list of
 * RelationStorage in the current memory context.  The caller holds a lock.
 */
List *
rm_relation_storage(Oid relid)
{
	Relation	rel = table_open(relid, NoLock);
	List	   *oids = list_copy(RelationGetIndexList(rel));
	List	   *result = NIL;
	ListCell   *lc;

	oids = lappend_oid(oids, relid);
	if (OidIsValid(rel->rd_rel->reltoastrelid))
		oids = lappend_oid(oids, rel->rd_rel->reltoastrelid);
	table_close(rel, NoLock);

	foreach(lc, oids)
	{
		HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(lfirst_oid(lc)));
		RelationStorage *storage;

		if (!HeapTupleIsValid(tup))
			continue;
		storage = palloc(sizeof(RelationStorage));
		storage->relid = lfirst_oid(lc);
		storage->relfilenode = ((Form_pg_class) GETSTRUCT(tup))->relfilenode;
		result = lappend(result, storage);
		ReleaseSysCache(tup);
	}
	return result;
}

/* has it other storage now, or none then? */
static bool
storage_changed(List *old_storage, Oid relid, Oid relfilenode)
{
	ListCell   *lc;

	if (old_storage == NIL)
		return false;
	foreach(lc, old_storage)
	{
		RelationStorage *storage = lfirst(lc);

		if (storage->relid == relid)
			return storage->relfilenode != relfilenode;
	}
	return true;
}

/* the row of the account for a lock of the transaction under way, at its end */
static RmLockStat *
note_lock(RmLockAccount *account, LOCKMODE mode, Form_pg_class form, const char *role)
{
	RmLockStat *stat = stat_for(account, form->oid, mode);

	if (stat->relation == NULL)
		stat->relation =
			MemoryContextStrdup(account->cxt,
								quote_qualified_identifier(get_namespace_name(form->relnamespace),
														   NameStr(form->relname)));
	stat->role = role;
	stat->seen = true;
	if (!stat->current)
		begin_hold(account, stat, account->strong && mode >= ShareLock ?
				   account->strong_from : account->xact_start, true);
	return stat;
}

/* all modes that we hold on a relation */
static void
note_locks(RmLockAccount *account, LockInstanceData *lock, Form_pg_class form,
		   const char *role, List *old_storage)
{
	for (LOCKMODE mode = AccessShareLock; mode <= MaxLockMode; mode++)
	{
		RmLockStat *stat;

		if ((lock->holdMask & LOCKBIT_ON(mode)) == 0)
			continue;
		stat = note_lock(account, mode, form, role);
		if (mode == AccessExclusiveLock || mode == ShareUpdateExclusiveLock)
			stat->rewritten |= storage_changed(old_storage, form->oid, form->relfilenode);
		if (mode >= ShareLock)
			account->blocking = true;
	}
}

/*
 * The strongest mode on a table that this transaction has made, for a step
 * whose work that is.  It keeps nobody out.
 */
static void
note_new_table(RmLockAccount *account, LockInstanceData *lock, Form_pg_class form)
{
	LOCKMODE	mode = MaxLockMode;

	while ((lock->holdMask & LOCKBIT_ON(mode)) == 0)
		mode--;
	note_lock(account, mode, form, "new table")->harmless = true;
}

/*
 * An index that was known before and is being dropped by this transaction.  To
 * everybody else it is dead already, see index_drop(): nobody opens it.
 */
static void
note_dropped_index(RmLockAccount *account, Oid relid)
{
	RmLockStat *known = NULL;
	RmLockStat *stat;
	ListCell   *lc;

	foreach(lc, account->stats)
	{
		stat = lfirst(lc);
		if (stat->relid == relid && strcmp(stat->role, "index") == 0)
			known = stat;
	}
	if (known == NULL)
		return;
	stat = stat_for(account, relid, AccessExclusiveLock);
	stat->relation = known->relation;
	stat->role = "dropped index";
	stat->harmless = stat->seen = true;
	begin_hold(account, stat, account->xact_start, true);
}

/* does somebody wait for a relation on which we have a lock that blocks writers? */
static bool
is_waited_for(const LockData *data)
{
	for (int i = 0; i < data->nelements; i++)
	{
		const LockInstanceData *waiter = &data->locks[i];

		if (waiter->waitLockMode == NoLock || waiter->locktag.locktag_type != LOCKTAG_RELATION)
			continue;
		for (int j = 0; j < data->nelements; j++)
			if (data->locks[j].pid == MyProcPid && data->locks[j].holdMask >= LOCKBIT_ON(ShareLock) &&
				memcmp(&data->locks[j].locktag, &waiter->locktag, sizeof(LOCKTAG)) == 0)
				return true;
	}
	return false;
}

/* reads our own entries in the lock table into the account */
static void
read_lock_table(RmLockAccount *account, Oid target, List *old_storage)
{
	LockData   *data = GetLockStatusData();

	account->queued = is_waited_for(data);
	for (int i = 0; i < data->nelements; i++)
	{
		LockInstanceData *lock = &data->locks[i];
		Oid			relid;
		HeapTuple	tup;
		Form_pg_class form;

		if (lock->pid != MyProcPid || lock->holdMask == 0 ||
			lock->locktag.locktag_type != LOCKTAG_RELATION ||
			lock->locktag.locktag_field1 != MyDatabaseId)
			continue;
		relid = lock->locktag.locktag_field2;
		tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
		if (!HeapTupleIsValid(tup))
		{
			/* dropped by this very transaction */
			if (account == watched &&
				(lock->holdMask & LOCKBIT_ON(AccessExclusiveLock)) != 0)
				note_dropped_index(account, relid);
			continue;
		}
		form = (Form_pg_class) GETSTRUCT(tup);

		/* an index made anew for a table that was there before is worth telling */
		if (!is_user_relation(relid, form))
			;
		else if (old_storage != NIL || !is_new_relation(relid))
			note_locks(account, lock, form, relation_role(relid, form, target), old_storage);
		else if (form->relkind == RELKIND_RELATION && is_new_relation(target))
			note_new_table(account, lock, form);
		ReleaseSysCache(tup);
	}
}

/*
 * Notes every relation lock that this transaction holds.  Call it as the last
 * thing before commit; target is the migration's table.  old_storage is what
 * rm_relation_storage() gave before the work, or NIL: nothing can have been
 * rewritten.  Once they are known, transactions that take no other lock by
 * rm_lock_relation() and rewrite nothing are believed to take the same ones.
 */
void
rm_lock_account_collect(RmLockAccount *account, Oid target, List *old_storage)
{
	if (account->complete && old_storage == NIL)
		return;					/* a batch like the one before it */
	read_lock_table(account, target, old_storage);
	account->complete = true;
}

/* a lock was held for so long, or, if bound, not longer */
static void
add_hold(RmLockStat *stat, double ms, bool bound)
{
	if (stat->times == 0 || ms > stat->hold_ms)
	{
		stat->hold_ms = ms;
		stat->bound = bound;
	}
	stat->times++;
}

/* the lock of a transaction, held until then */
static void
end_hold(RmLockStat *stat, instr_time until)
{
	add_hold(stat, ms_between(stat->acquired, until), stat->current_bound);
	stat->current = false;
}

/*
 * The transaction has committed, or was rolled back (then its locks went about
 * now): add up the holds.
 */
void
rm_lock_account_end(RmLockAccount *account)
{
	ListCell   *lc;

	if (release_armed)
	{
		release_armed = false;
		INSTR_TIME_SET_CURRENT(release_time);
	}
	foreach(lc, account->held)
	{
		RmLockStat *stat = lfirst(lc);

		if (stat->current)
			end_hold(stat, release_time);
	}
	list_free(account->held);
	account->held = NIL;
}

/*-------------------------------------------------------------------------
 * A statement in a worker, in transactions of its own
 *-------------------------------------------------------------------------
 */

/*
 * At the end of each of its transactions.  What is not there any more was let
 * go with the one before; the table's lock is the session's, and goes last.
 */
static void
collect_watched(XactEvent event, void *arg)
{
	ListCell   *lc;

	if (watched == NULL || event != XACT_EVENT_PRE_COMMIT)
		return;
	foreach(lc, watched->stats)
		((RmLockStat *) lfirst(lc))->seen = false;
	read_lock_table(watched, watched_notes->target, NIL);
	foreach(lc, watched->stats)
	{
		RmLockStat *stat = lfirst(lc);

		if (stat->current && !stat->seen && !stat->explicit)
			end_hold(stat, watched->xact_start);
	}
}

/*
 * Takes SHARE UPDATE EXCLUSIVE on notes->relid, if given, until rm_lock_watch_end():
 * the lock that CREATE INDEX CONCURRENTLY takes on its table for all its
 * transactions, so that its wait and its hold can be stamped.  From here on all
 * locks are noted.  Outside of a transaction.
 */
void
rm_lock_watch(RmLockNotes *notes)
{
	RmLockAccount *account = MemoryContextAllocZero(TopMemoryContext, sizeof(RmLockAccount));
	LockRelId	lockrelid = {.relId = notes->relid,.dbId = MyDatabaseId};

	account->cxt = AllocSetContextCreate(TopMemoryContext, "rm locks of a statement",
										 ALLOCSET_DEFAULT_SIZES);
	watched_notes = notes;
	if (OidIsValid(notes->relid))
	{
		RmLockStat *stat = stat_for(account, notes->relid, ShareUpdateExclusiveLock);
		instr_time	before;
		instr_time	after;

		stat->explicit = true;
		StartTransactionCommand();
		INSTR_TIME_SET_CURRENT(before);
		LockRelationIdForSession(&lockrelid, ShareUpdateExclusiveLock);
		INSTR_TIME_SET_CURRENT(after);
		stat->wait_ms = ms_between(before, after);
		begin_hold(account, stat, after, false);
		CommitTransactionCommand();
	}
	INSTR_TIME_SET_CURRENT(account->xact_start);
	watched = account;
}

/*
 * The statement has ended, and its transaction; also one that failed, which has
 * lost the session's locks.  Or this process is on its way out and has let
 * everything go.  Writes the notes.
 */
void
rm_lock_watch_end(void)
{
	RmLockAccount *account = watched;
	RmLockNotes *notes = watched_notes;
	LOCKTAG		tag;
	ListCell   *lc;

	if (account == NULL)
		return;
	watched = NULL;
	SET_LOCKTAG_RELATION(tag, MyDatabaseId, notes->relid);
	if (OidIsValid(notes->relid) && rm_holds_lock(&tag, ShareUpdateExclusiveLock))
		(void) LockRelease(&tag, ShareUpdateExclusiveLock, true);
	release_armed = true;
	rm_lock_account_end(account);
	foreach(lc, account->stats)
	{
		RmLockStat *stat = lfirst(lc);
		RmLockNote *note;

		/* a relation without a name was gone before the first commit */
		if (stat->relation == NULL)
			continue;
		if (notes->n == notes->size)
		{
			notes->left_off++;
			continue;
		}
		note = &notes->notes[notes->n++];
		note->relid = stat->relid;
		note->mode = stat->mode;
		note->bound = stat->bound;
		note->rewritten = stat->rewritten;
		note->harmless = stat->harmless;
		note->wait_ms = stat->wait_ms;
		note->hold_ms = stat->hold_ms;
		strlcpy(note->role, stat->role, sizeof(note->role));
		strlcpy(note->relation, stat->relation, sizeof(note->relation));
	}
	MemoryContextDelete(account->cxt);
	pfree(account);
}

/* what another process has told goes into the account */
void
rm_lock_notes_add(RmLockAccount *account, const RmLockNotes *notes)
{
	for (int i = 0; i < notes->n; i++)
	{
		const RmLockNote *note = &notes->notes[i];
		RmLockStat *stat = stat_for(account, note->relid, note->mode);

		if (stat->relation == NULL)
			stat->relation = MemoryContextStrdup(account->cxt, note->relation);
		stat->role = MemoryContextStrdup(account->cxt, note->role);
		add_hold(stat, note->hold_ms, note->bound);
		stat->rewritten |= note->rewritten;
		stat->harmless |= note->harmless;
		stat->wait_ms = Max(stat->wait_ms, note->wait_ms);
	}
	if (notes->left_off > 0)
		ereport(LOG,
				(errmsg("rm_lock_report() has no room for %d locks of a background worker's statement",
						notes->left_off)));
}

/*
 * A statement has waited so long for transactions of others.  Such a lock is on
 * no relation, and is let go at once.
 */
void
rm_lock_note_wait(RmLockAccount *account, double wait_ms)
{
	RmLockStat *stat = stat_for(account, InvalidOid, ShareLock);

	stat->role = "transactions";
	stat->harmless = true;
	stat->wait_ms = Max(stat->wait_ms, wait_ms);
	stat->times++;
}

/* no lock is waited for longer, until the end of the transaction */
static void
bound_wait(long ms)
{
	char		value[32];

	snprintf(value, sizeof(value), "%ld", Max(1, ms));
	(void) set_config_option("lock_timeout", value, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
}

/*
 * From here to the end of the transaction no lock is waited for longer than
 * risky_migrations.lock_timeout (55P03).
 */
void
rm_lock_bound_waits(void)
{
	bound_wait(rm_lock_timeout);
	rm_lock_yield_in_deadlocks();
}

/*
 * From here to the end of the transaction we look for a deadlock earlier than
 * others do: whoever finds it is the one who has to give up (40P01).
 */
void
rm_lock_yield_in_deadlocks(void)
{
	char		value[32];

	snprintf(value, sizeof(value), "%d",
			 Max(1, Min(DeadlockTimeout, rm_lock_timeout / 2)));
	(void) set_config_option("deadlock_timeout", value, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
}

/*
 * The lock on relid has been got: notes it, and the relation's name.  False if
 * the relation is gone, for a lock can be had on that as well.
 */
static bool
note_taken(RmLockAccount *account, RmLockStat *stat, Oid relid)
{
	instr_time	now;

	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
		return false;
	INSTR_TIME_SET_CURRENT(now);
	begin_hold(account, stat, now, false);
	if (stat->mode >= ShareLock)
		account->blocking = true;
	if (stat->relation == NULL)
		stat->relation =
			MemoryContextStrdup(account->cxt,
								quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)),
														   get_rel_name(relid)));
	return true;
}

/*
 * The pid of an autovacuum worker that vacuums the relation to prevent
 * wraparound, 0 if there is none.  It gives way to nobody.
 */
int
rm_wraparound_vacuum(Oid relid)
{
	LockData   *data = GetLockStatusData();
	int			pid = 0;

	for (int i = 0; i < data->nelements && pid == 0; i++)
	{
		LockInstanceData *lock = &data->locks[i];
		PGPROC	   *proc;

		if (lock->locktag.locktag_type != LOCKTAG_RELATION ||
			lock->locktag.locktag_field1 != MyDatabaseId ||
			lock->locktag.locktag_field2 != relid ||
			(lock->holdMask & LOCKBIT_ON(ShareUpdateExclusiveLock)) == 0)
			continue;
		proc = BackendPidGetProc(lock->pid);
		if (proc && (proc->statusFlags & PROC_VACUUM_FOR_WRAPAROUND))
			pid = lock->pid;
	}
	/* whoever waits for it asks often, and in the same memory context */
	pfree(data->locks);
	pfree(data);
	return pid;
}

/*
 * Takes a lock on a relation until the end of the transaction, with the wait
 * bounded as rm_lock_bound_waits() says.  False if the relation is gone: it may
 * have been dropped while it was waited for.
 *
 * A vacuum against wraparound is not queued behind, since it would not give
 * way: 55P03 at once, and account->vacuumed is set.
 *
 * Only for the first relation of a transaction: while one lock is held no
 * other may be waited for.
 */
bool
rm_lock_relation_if_there(RmLockAccount *account, Oid relid, LOCKMODE mode)
{
	RmLockStat *stat = stat_for(account, relid, mode);
	instr_time	before;
	instr_time	after;

	stat->explicit = true;
	if (DoLockModesConflict(mode, ShareUpdateExclusiveLock) &&
		rm_wraparound_vacuum(relid) != 0)
	{
		account->vacuumed = relid;
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("autovacuum works on the table to prevent wraparound")));
	}
	INSTR_TIME_SET_CURRENT(before);
	PG_TRY();
	{
		LockRelationOid(relid, mode);
	}
	PG_CATCH();
	{
		INSTR_TIME_SET_CURRENT(after);
		stat->wait_ms = Max(stat->wait_ms, ms_between(before, after));
		PG_RE_THROW();
	}
	PG_END_TRY();
	INSTR_TIME_SET_CURRENT(after);
	stat->wait_ms = Max(stat->wait_ms, ms_between(before, after));
	return note_taken(account, stat, relid);
}

/* the same; 42P01 if the relation is gone */
void
rm_lock_relation(RmLockAccount *account, Oid relid, LOCKMODE mode)
{
	if (!rm_lock_relation_if_there(account, relid, mode))
		rm_refuse_missing(relid);
}

/* one of several relations that are needed together was dropped: try again */
static void
refuse_gone(RmLockAccount *account, Oid relid)
{
	account->missed = true;
	ereport(ERROR,
			(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
			 errmsg("a relation was dropped while it was waited for"),
			 errdetail("It had the OID %u.", relid)));
}

/* does this transaction have a lock of rm_lock_relation() that keeps out writers? */
static bool
keeps_others_out(RmLockAccount *account)
{
	ListCell   *lc;

	foreach(lc, account->held)
	{
		RmLockStat *stat = lfirst(lc);

		if (stat->explicit && stat->current && stat->mode >= ShareLock)
			return true;
	}
	return false;
}

/* which of them to wait for, on that turn */
static int
pick_first(RmLockAccount *account, List *relids, int turn)
{
	int			first = turn;

	/* whoever got to a partition by its table holds a lock on that too */
	if (turn % 2 == 0 && get_rel_relkind(linitial_oid(relids)) == RELKIND_PARTITIONED_TABLE)
		return 0;
	for (int i = 0; i < list_length(relids); i++)
		if (list_nth_oid(relids, i) == account->waited_for)
			first += i;
	return first % list_length(relids);
}

/* milliseconds from now until then; not below 0 */
static long
ms_until(TimestampTz then)
{
	return TimestampDifferenceMilliseconds(GetCurrentTimestamp(), then);
}

/* looks at nothing for so long, which is short */
static void
doze(long ms)
{
	(void) WaitLatch(NULL, WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, ms, PG_WAIT_EXTENSION);
	CHECK_FOR_INTERRUPTS();
}

/*
 * Takes the lock on a relation while others are held, if it is free by then: asks
 * from time to time, so that nobody stands behind the request.
 */
static bool
take_if_free(RmLockAccount *account, Oid relid, LOCKMODE mode, TimestampTz patience)
{
	RmLockStat *stat = stat_for(account, relid, mode);
	instr_time	before;

	stat->explicit = true;
	INSTR_TIME_SET_CURRENT(before);
	while (!ConditionalLockRelationOid(relid, mode))
	{
		if (ms_until(patience) <= 0)
			return false;
		doze(1);
	}
	stat->wait_ms = Max(stat->wait_ms, rm_elapsed_ms(before));
	if (!note_taken(account, stat, relid))
		refuse_gone(account, relid);
	return true;
}

/* lets go of so many of the relations from that one on, before the transaction ends */
static void
let_go(RmLockAccount *account, List *relids, int first, int n, LOCKMODE mode)
{
	instr_time	now;

	for (int i = 0; i < n; i++)
		UnlockRelationOid(list_nth_oid(relids, (first + i) % list_length(relids)), mode);
	INSTR_TIME_SET_CURRENT(now);
	for (int i = 0; i < n; i++)
		end_hold(stat_for(account, list_nth_oid(relids, (first + i) % list_length(relids)), mode),
				 now);
}

/* has this transaction a lock on a relation that blocks writers of it? */
static bool
holds_strong_lock(void)
{
	LockData   *data = GetLockStatusData();
	bool		found = false;

	for (int i = 0; i < data->nelements && !found; i++)
		found = data->locks[i].pid == MyProcPid &&
			data->locks[i].locktag.locktag_type == LOCKTAG_RELATION &&
			data->locks[i].holdMask >= LOCKBIT_ON(ShareLock);
	return found;
}

/*
 * Takes a lock on each of the relations: one of them is waited for, bounded as
 * above, the others are taken only if they fall free while others stand for
 * milliseconds behind what is held.  If not, all are let go and others pass;
 * then the next one is waited for.  All this together takes no longer than
 * risky_migrations.lock_timeout (55P03, and the transaction's end lets all go).
 * The list was made before: where another than its first, which is the table, has
 * been dropped since, that is 55P03 too, and the next try will have a list without it.
 *
 * Which one is waited for matters: with the right one, often the first that
 * others' transactions touch, the rest falls free while they queue behind it.  It
 * is remembered for the next set.  Where others lock two of them in either order
 * none is the right one: whoever holds the second already stands behind our first,
 * and keeps the second as long as we have that.  Then it takes a moment in which
 * none of them is just between the two, and this looks for it often.  Of a
 * partitioned table, which comes first, every other turn waits for the table itself.
 *
 * account->missed tells that others were kept waiting for milliseconds only, so
 * that the pauses need not grow before each relation has had its turn.
 */
void
rm_lock_relations(RmLockAccount *account, List *relids, LOCKMODE mode, int tries)
{
	int			n = list_length(relids);
	bool		held = keeps_others_out(account);
	bool		first_strong = mode >= ShareLock && !account->strong && !holds_strong_lock();
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), rm_lock_timeout);

	account->set_size = n;
	for (int round = 0;; round++)
	{
		int			first = pick_first(account, relids, tries + round);
		int			taken = 1;
		TimestampTz patience = 0;
		char	   *name;

		if (first == 0)
			rm_lock_relation(account, linitial_oid(relids), mode);
		else if (!rm_lock_relation_if_there(account, list_nth_oid(relids, first), mode))
			refuse_gone(account, list_nth_oid(relids, first));
		if (!held && round % 2 == 1)
			patience = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
												   Min(SET_PATIENCE, ms_until(deadline)));
		while (taken < n &&
			   take_if_free(account, list_nth_oid(relids, (first + taken) % n), mode, patience))
			taken++;
		if (taken == n)
		{
			if (n > 1)
				account->waited_for = list_nth_oid(relids, first);
			bound_wait(rm_lock_timeout);
			if (first_strong)
			{
				account->strong = true;
				INSTR_TIME_SET_CURRENT(account->strong_from);
			}
			return;
		}

		/* what is held from before would be kept while the next one is waited for */
		if (held || ms_until(deadline) <= SET_PAUSE)
		{
			account->missed = true;
			name = get_rel_name(list_nth_oid(relids, (first + taken) % n));
			ereport(ERROR,
					(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
					 errmsg("relation \"%s\" is in use", name ? name : "?"),
					 errdetail("It is needed together with others, and is not waited for while those are held.")));
		}
		let_go(account, relids, first, taken, mode);
		doze(1 + pg_prng_uint64(&pg_global_prng_state) % SET_PAUSE);
		bound_wait(ms_until(deadline));
	}
}

/* locks in the lock table that others hold, each once whoever shares it */
static int64
locks_of_others(void)
{
	LockData   *data = GetLockStatusData();
	HASHCTL		ctl = {.keysize = sizeof(LOCKTAG),.entrysize = sizeof(LOCKTAG),
	.hcxt = CurrentMemoryContext};
	HTAB	   *tags = hash_create("rm locks of others", 1024, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	int64		n;

	for (int i = 0; i < data->nelements; i++)
		if (data->locks[i].pid != MyProcPid && !data->locks[i].fastpath)
			(void) hash_search(tags, &data->locks[i].locktag, HASH_ENTER, NULL);
	n = hash_get_num_entries(tags);
	hash_destroy(tags);
	return n;
}

/*
 * The lock table is of a fixed size, and shared by all: 53400 if the most locks that the
 * method holds at once, on the table, all below it and what belongs to them, do not fit into
 * it beside those that others hold now.  Asked before the migration begins (migration_id
 * 0), so that it does not fail after hours of copying; and again before that many locks are
 * taken, since they would be missing for others.  A small part of it is everybody's to take;
 * there is a bit more room than is counted here.  columns: of RmConversionDef.  Needs SPI.
 */
void
rm_lock_check_room(const char *method, Oid relid, List *columns, int64 migration_id)
{
	Oid			types[] = {TEXTOID, OIDOID, INT2ARRAYOID, BOOLOID};
	Datum		v[] = {CStringGetTextDatum(method), ObjectIdGetDatum(relid),
		rm_attnum_array(rm_attnums_of(columns, relid)), BoolGetDatum(false)};
	int			slots = MaxBackends + max_prepared_xacts;
	int64		room = (int64) max_locks_per_xact * slots;
	int64		others = locks_of_others();
	int64		needed;
	int64		per_slot;
	ListCell   *lc;

	foreach(lc, columns)
		if (get_typstorage(((RmConversionDef *) lfirst(lc))->type) != TYPSTORAGE_PLAIN)
			v[3] = BoolGetDatum(true);
	rm_catalog_query("SELECT risky_migrations.locks_needed($1, $2, $3, $4)", 4, types, v);
	needed = rm_result_int64(0, 1);
	if (needed <= room / SMALL_PART || needed + others <= room)
		return;
	/* with something to spare */
	per_slot = Max((needed + others) * 5 / 4 / slots, max_locks_per_xact) + 1;
	ereport(ERROR,
			(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
			 errmsg("the server's lock table has no room for the locks that %s needs on %s",
					method, rm_relation_sql(relid)),
			 errdetail("It holds about %lld locks at once, on the table, all below it, and what belongs to them. There is room for %lld, and others hold %lld now.",
					   (long long) needed, (long long) room, (long long) others),
			 migration_id == 0 ?
			 errhint("Set max_locks_per_transaction to %lld or more (it is %d) and restart the server.",
					 (long long) per_slot, max_locks_per_xact) :
			 needed <= room ?
			 errhint("Wait until others hold fewer, then SELECT rm_resume(%lld); or set max_locks_per_transaction to %lld or more (it is %d) and restart the server before.",
					 (long long) migration_id, (long long) per_slot, max_locks_per_xact) :
			 errhint("Set max_locks_per_transaction to %lld or more (it is %d) and restart the server, then SELECT rm_resume(%lld): what is done stays.",
					 (long long) per_slot, max_locks_per_xact, (long long) migration_id)));
}

/*
 * Processes that hold a lock which conflicts with one that this step takes by
 * rm_lock_relation() or rm_lock_relations(); as a list of int, without repeats.
 */
List *
rm_lock_blocking_pids(RmLockAccount *account)
{
	LockData   *data = GetLockStatusData();
	List	   *pids = NIL;

	for (int i = 0; i < data->nelements; i++)
	{
		LockInstanceData *lock = &data->locks[i];

		if (lock->pid == MyProcPid || lock->pid == 0 || lock->holdMask == 0 ||
			lock->locktag.locktag_type != LOCKTAG_RELATION ||
			lock->locktag.locktag_field1 != MyDatabaseId)
			continue;
		for (LOCKMODE mode = AccessShareLock; mode <= MaxLockMode; mode++)
		{
			RmLockStat *stat = find_stat(account, lock->locktag.locktag_field2, mode);

			if (stat == NULL || !stat->explicit)
				continue;
			for (LOCKMODE held = AccessShareLock; held <= MaxLockMode; held++)
				if ((lock->holdMask & LOCKBIT_ON(held)) && DoLockModesConflict(held, mode))
					pids = list_append_unique_int(pids, lock->pid);
		}
	}
	return pids;
}

/*
 * Who holds a lock on the relation that conflicts with mode, as text for an
 * error's detail; NULL if nobody does (any more).  A prepared transaction has no
 * process.
 */
char *
rm_lock_blockers(Oid relid, LOCKMODE mode)
{
	LockData   *data = GetLockStatusData();
	StringInfoData buf;

	initStringInfo(&buf);
	for (int i = 0; i < data->nelements; i++)
	{
		LockInstanceData *lock = &data->locks[i];

		if (lock->pid == MyProcPid ||
			lock->locktag.locktag_type != LOCKTAG_RELATION ||
			lock->locktag.locktag_field1 != MyDatabaseId ||
			lock->locktag.locktag_field2 != relid)
			continue;
		for (LOCKMODE held = AccessShareLock; held <= MaxLockMode; held++)
			if ((lock->holdMask & LOCKBIT_ON(held)) &&
				DoLockModesConflict(held, mode))
				appendStringInfo(&buf, "%s%s holds %s", buf.len ? ", " : "",
								 lock->pid == 0 ? "a prepared transaction (see pg_prepared_xacts)" :
								 psprintf("process %d", lock->pid),
								 GetLockmodeName(DEFAULT_LOCKMETHOD, held));
	}
	return buf.len ? buf.data : NULL;
}

static void
set_runner_tag(LOCKTAG *tag, RmRunnerLock kind, int64 id)
{
	SET_LOCKTAG_ADVISORY(*tag, MyDatabaseId, (uint32) (id >> 32), (uint32) id,
						 (uint16) kind);
}

/*
 * Takes the session-level lock of that kind and id without waiting.  False,
 * and the holder's pid, if another session has it.  It is kept across
 * transactions until rm_runner_unlock() or the end of the session.
 */
bool
rm_runner_lock(RmRunnerLock kind, int64 id, int *holder_pid)
{
	LOCKTAG		tag;

	set_runner_tag(&tag, kind, id);
	if (LockAcquire(&tag, ExclusiveLock, true, true) != LOCKACQUIRE_NOT_AVAIL)
		return true;
	if (holder_pid)
		*holder_pid = rm_runner_pid(kind, id);
	return false;
}

/* the same until the end of the transaction */
bool
rm_transaction_lock(RmRunnerLock kind, int64 id)
{
	LOCKTAG		tag;

	set_runner_tag(&tag, kind, id);
	return LockAcquire(&tag, ExclusiveLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

/* does this session have it? */
bool
rm_runner_lock_held(RmRunnerLock kind, int64 id)
{
	LOCKTAG		tag;

	set_runner_tag(&tag, kind, id);
	return rm_holds_lock(&tag, ExclusiveLock);
}

void
rm_runner_unlock(RmRunnerLock kind, int64 id)
{
	LOCKTAG		tag;

	set_runner_tag(&tag, kind, id);
	LockRelease(&tag, ExclusiveLock, true);
}

/* pid of the process that holds that lock, 0 if none does */
int
rm_runner_pid(RmRunnerLock kind, int64 id)
{
	LockData   *data = GetLockStatusData();
	LOCKTAG		tag;

	set_runner_tag(&tag, kind, id);
	for (int i = 0; i < data->nelements; i++)
		if (data->locks[i].holdMask != 0 &&
			memcmp(&data->locks[i].locktag, &tag, sizeof(LOCKTAG)) == 0)
			return data->locks[i].pid;
	return 0;
}

/*-------------------------------------------------------------------------
 * Marks
 *-------------------------------------------------------------------------
 */

/*
 * Adds up the rows of a catalog that an index finds by one or two OIDs; with
 * InvalidOid for the index, all.  Another sum when one was written, came or went.
 * tell is called for each, and gives what else is to be added.
 */
static uint32
mark_of_rows(Oid catalog_oid, Oid index, Oid key, Oid second_key, Snapshot snapshot,
			 uint32 (*tell) (HeapTuple tup, TupleDesc desc, Snapshot snapshot))
{
	Relation	catalog = table_open(catalog_oid, AccessShareLock);
	ScanKeyData keys[2];
	int			nkeys = OidIsValid(index) ? (OidIsValid(second_key) ? 2 : 1) : 0;
	SysScanDesc scan;
	HeapTuple	tup;
	uint32		mark = 0;

	/* the indexes that are used here have the OIDs as their first columns */
	if (nkeys > 0)
	{
		Relation	rel = index_open(index, AccessShareLock);

		ScanKeyInit(&keys[0], rel->rd_index->indkey.values[0], BTEqualStrategyNumber, F_OIDEQ,
					ObjectIdGetDatum(key));
		if (nkeys > 1)
			ScanKeyInit(&keys[1], rel->rd_index->indkey.values[1], BTEqualStrategyNumber, F_OIDEQ,
						ObjectIdGetDatum(second_key));
		index_close(rel, AccessShareLock);
	}
	scan = systable_beginscan(catalog, index, nkeys > 0, snapshot, nkeys, keys);
	while (HeapTupleIsValid(tup = systable_getnext(scan)))
	{
		/* they come in any order */
		mark += hash_combine(HeapTupleHeaderGetRawXmin(tup->t_data),
							 hash_combine(ItemPointerGetBlockNumberNoCheck(&tup->t_self),
										  ItemPointerGetOffsetNumberNoCheck(&tup->t_self)));
		if (tell)
			mark += tell(tup, RelationGetDescr(catalog), snapshot);
	}
	systable_endscan(scan);
	table_close(catalog, AccessShareLock);
	return mark;
}

/* what hangs on a relation: its comment */
static uint32
mark_of_dependent(HeapTuple tup, TupleDesc desc, Snapshot snapshot)
{
	Form_pg_depend d = (Form_pg_depend) GETSTRUCT(tup);

	/* rowtypes, and what is found by pg_index */
	if (d->classid == TypeRelationId || d->classid == RelationRelationId)
		return 0;
	return mark_of_rows(DescriptionRelationId, DescriptionObjIndexId, d->objid, d->classid,
						snapshot, NULL);
}

/* an index: its name and options, its comment */
static uint32
mark_of_index(HeapTuple tup, TupleDesc desc, Snapshot snapshot)
{
	Oid			index = ((Form_pg_index) GETSTRUCT(tup))->indexrelid;

	return mark_of_rows(RelationRelationId, ClassOidIndexId, index, InvalidOid, snapshot, NULL) +
		mark_of_rows(DescriptionRelationId, DescriptionObjIndexId, index, RelationRelationId,
					 snapshot, NULL);
}

/*
 * A mark of each of these relations, and of default privileges, that is another one
 * when somebody has changed what SHARE UPDATE EXCLUSIVE on the relation does not keep
 * from being changed: privileges (GRANT takes no lock); what depends on it, as a view
 * or a sequence may from now on; names, options and comments of its indexes and
 * statistics objects, which have locks of their own; and comments on its constraints,
 * triggers, rules and policies.
 */
List *
rm_relation_marks(List *relids)
{
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	List	   *marks = NIL;
	ListCell   *lc;

	foreach(lc, relids)
	{
		Oid			relid = lfirst_oid(lc);
		Oid			type = get_rel_type_id(relid);
		uint32		mark;

		mark = mark_of_rows(RelationRelationId, ClassOidIndexId, relid, InvalidOid, snapshot, NULL);
		mark += mark_of_rows(AttributeRelationId, AttributeRelidNumIndexId, relid, InvalidOid,
							 snapshot, NULL);
		if (OidIsValid(type))
			mark += mark_of_rows(TypeRelationId, TypeOidIndexId, type, InvalidOid, snapshot, NULL);
		mark += mark_of_rows(DependRelationId, DependReferenceIndexId, RelationRelationId, relid,
							 snapshot, mark_of_dependent);
		mark += mark_of_rows(IndexRelationId, IndexIndrelidIndexId, relid, InvalidOid, snapshot,
							 mark_of_index);
		mark += mark_of_rows(StatisticExtRelationId, StatisticExtRelidIndexId, relid, InvalidOid,
							 snapshot, NULL);
		marks = lappend_int(marks, (int) mark);
	}
	marks = lappend_int(marks, (int) mark_of_rows(DefaultAclRelationId, InvalidOid, InvalidOid, InvalidOid,
												  snapshot, NULL));
	UnregisterSnapshot(snapshot);
	return marks;
}
