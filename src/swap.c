/*-------------------------------------------------------------------------
 *
 * swap.c
 *	  The steps "build", "swap" and "cleanup" of three_step: another column
 *	  takes the old one's place, and the way back.
 *
 *	build		everything that hangs on the old column is made on the new one
 *				beside it, under names of its own: indexes CONCURRENTLY by a
 *				worker, constraints NOT VALID and then VALIDATEd, statistics;
 *				then ANALYZE, so that plans are good from the first moment.
 *	swap		first all snapshots that are older than the last backfilled row
 *				are waited out, holding nothing.  Then one transaction, with
 *				ACCESS EXCLUSIVE on the table and on whatever hangs on it: what
 *				depends on the old column goes, the columns are renamed, what
 *				was built takes the old names, and views, rules, policies and
 *				triggers are made again from their definitions.  Of a
 *				partitioned table all partitions are locked in the same set; its
 *				own indexes, which hold nothing, are made between, and those of
 *				the partitions attached.  A foreign key that refers to a
 *				partitioned table needs such an index: whether it holds is looked
 *				up before, it is added NOT VALID, and validated afterwards.
 *				Materialized views are filled between the wait and the exchange,
 *				see matviews.c.  A table's children are locked with it too.
 *	cleanup		the old column goes.
 *
 * Between swap and cleanup the sync trigger runs the other way, so the swap can
 * be taken back: the same things in the same order, from the new column to the
 * old one.  What hung on the old column was written down when it was built for
 * the new one, and is built again for the old one before the columns change
 * places; plain indexes never went away.  What refuses writes (NOT NULL, unique
 * indexes, CHECK, foreign keys) is put aside meanwhile: a value that does not
 * fit the old type is recorded, and closes the way back.  A record is a hint: when
 * the way back is asked for, the rows themselves are looked at, and those whose
 * old value can be made by now are mended.  If the way back fails, what was built
 * for it and could refuse a write goes again.
 *
 * Who may be under way during the swap: nobody who has touched the table, for
 * they hold a lock on it.  Who begins before and ends after it without having
 * touched it reads, with an old snapshot (REPEATABLE READ), rows that were
 * filled before the snapshot was taken: that is what the wait is for.  A crash
 * leaves the state before or after each of these transactions; what was built
 * by then is found again by its name in the catalogs.
 *
 * Easy to get wrong: between the moment at which all was built and the lock,
 * somebody may add an index or change a constraint.  A fingerprint of the
 * catalogs is taken when all is there, and compared under the lock; if it is
 * another one the locks are let go and the building begins again.  What was
 * planned is text with names in it: before the swap it is planned again when
 * names change; after it the way back wants them as they were.  And what is built
 * is told by its name: if its definition is another one by now, it has to go.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_class.h"
#include "catalog/pg_constraint.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "definitions.h"
#include "dependents.h"
#include "executor/spi.h"
#include "leaves.h"
#include "matviews.h"
#include "miscadmin.h"
#include "risky_migrations.h"
#include "rows.h"
#include "snapshots.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

/* phases, in the state row; build ends where swap goes on */
enum
{
	PHASE_PLAN,					/* find out what is needed, write it down */
	PHASE_MAKE,					/* make it, one thing after the other */
	PHASE_ANALYZE,
	PHASE_CHECK,				/* is it still what is needed? */
	PHASE_WAIT,					/* for older snapshots */
	PHASE_EXCHANGE,
	PHASE_LOOK,					/* the way back: not all rows are looked at */
	PHASE_PROVE,				/* exchanged: foreign keys are to be validated */
	PHASE_FILL					/* before the exchange: materialized views */
};

/* how often a waiting swap looks whether the snapshots are gone, milliseconds */
#define SNAPSHOT_LOOK 200
/* and how often whether a background worker is free */
#define WORKER_LOOK 1000
/* pages that one look for closed ways back goes through */
#define CHECK_PAGES 4096

/* memory of these steps across their transactions */
typedef struct Swap
{
	bool		planned;		/* by this run: else plan anew */
	bool		by_leaf;
	bool		goes_back;		/* to an earlier step */
	int			gone;			/* how often a leaf was dropped just then */
	RmSnapshotWait snapshots;	/* whom it has waited for */
	Oid			leaf;			/* of the look at the way back, and ... */
	BlockNumber next_block;		/* ... where it goes on in it */
	bool		looked;
	int64		unfit;			/* rows that do not fit the old type */
	bool		announced;		/* what comes next is shown in rm_progress */
	bool		asked;			/* a worker, by the last transaction */
	bool		asked_index;	/* ... for an index */
	int			worker_tries;	/* in vain */
	bool		no_worker;		/* rest before the next try */
	ErrorData  *failed;			/* why an index could not be built ... */
	bool		remains_done;	/* ... and what is left of it is dropped, if possible */
	bool		raised;
	RmCopies	copies;			/* of materialized views, on the side to come */
} Swap;

static Swap *
get_work(RmRun *run)
{
	if (run->work == NULL)
		run->work = MemoryContextAllocZero(run->cxt, sizeof(Swap));
	return run->work;
}

/* of these OIDs those of relations that have not been dropped */
static List *
relations_that_exist(List *relids)
{
	List	   *result = NIL;
	ListCell   *lc;

	foreach(lc, relids)
		if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(lfirst_oid(lc))))
			result = lappend_oid(result, lfirst_oid(lc));
	return result;
}

/*
 * Is it an index that another migration has built, and needs no more?  While it
 * does, ours has to take it along, for it may hold our column too.
 */
static bool
is_stale(const RmMigration *m, const RmDependent *d)
{
	char		side;
	long long	id;
	unsigned int oid;
	Oid			types[] = {INT8OID, BOOLOID};
	Datum		v[2];

	if (sscanf(d->name, "rm_%c_%lld_%u", &side, &id, &oid) != 3 || id == m->id)
		return false;
	v[0] = Int64GetDatum(id);
	v[1] = BoolGetDatum(side == 'o');
	rm_state_execute("SELECT FROM risky_migrations.migration"
					 " WHERE id = $1 AND swapped = $2 AND state = 'open'", 2, types, v, NULL);
	return SPI_processed == 0;
}

/*
 * What was planned for that side, without foreign keys and sequences whose
 * other end has been dropped since, and without partitions that are none any more.
 */
static List *
load_present(const RmMigration *m, bool new_side)
{
	List	   *members = rm_tree(m->relid);
	List	   *result = NIL;
	ListCell   *lc;

	foreach(lc, rm_dependents_load(m, new_side, CurrentMemoryContext))
	{
		RmDependent *d = lfirst(lc);
		List	   *ends = list_make1_oid(d->relid);

		if (OidIsValid(d->peer))
			ends = lappend_oid(ends, d->peer);
		if (list_length(relations_that_exist(ends)) == list_length(ends) &&
			list_length(list_difference_oid(ends, members)) < list_length(ends) &&
			!is_stale(m, d))
			result = lappend(result, d);
	}
	return result;
}

/* 55000 if the new column may differ from what the expression gives */
static void
refuse_unverified(const RmMigration *m)
{
	if (m->trigger_xmin == rm_trigger_xmin(m))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 m->trigger_xmin == 0 ?
			 errmsg("the new column of migration %lld has not been verified since the columns changed places again",
					(long long) m->id) :
			 errmsg("the sync trigger of migration %lld has been switched off for a while",
					(long long) m->id),
			 m->trigger_xmin == 0 ?
			 errdetail("What was written into it meanwhile may not be what the expression gives for the old one.") :
			 errdetail("Rows may have been written without being converted."),
			 errhint("CALL rm_enforce_not_null(%lld) verifies and mends every row again, then CALL rm_swap(%lld).",
					 (long long) m->id, (long long) m->id)));
}

/*-------------------------------------------------------------------------
 * build
 *-------------------------------------------------------------------------
 */

/*
 * Has a statement run by a worker after this transaction's commit.  relid is the
 * table on which it holds a lock from its beginning to its end, if it does; name
 * may be NULL.
 */
static void
ask_worker(RmRun *run, const char *sql, const char *what, Oid relid, const char *name)
{
	run->top_level = MemoryContextStrdup(run->cxt, sql);
	run->top_level_what = MemoryContextStrdup(run->cxt, what);
	run->top_level_relid = relid;
	run->top_level_tables = list_length(rm_tree(run->m->relid));
	run->wait_kind = "worker";
	run->wait_reason = name ? psprintf("%s %s", what, quote_identifier(name)) : what;
	get_work(run)->asked = true;
}

/* the names that the table and its columns have now: commands are made of them */
static void
take_names(RmMigration *m)
{
	m->relation = pstrdup(rm_relation_sql(m->relid));
	m->column = get_attname(m->relid, m->attnum, false);
	m->new_column = get_attname(m->relid, m->new_attnum, false);
}

/*
 * What is needed, for both directions; the table's definition stands still.
 * What was built for an earlier plan goes, unless it still is what is needed.
 */
static void
plan(RmRun *run)
{
	RmMigration *m = run->m;
	List	   *before = rm_dependents_load(m, true, CurrentMemoryContext);
	List	   *wanted;
	List	   *leftovers;
	ListCell   *lc;

	refuse_unverified(m);
	rm_lock_check_room(m->method->name, m->relid, m->columns, m->id);
	/* somebody may have added something since the migration began */
	rm_dependents_refuse(m->relid, m->attnum, m->new_type_id, false);
	take_names(m);
	wanted = rm_dependents_derive(m, true, CurrentMemoryContext);
	leftovers = rm_dependents_leftovers(m, true, rm_dependents_unchanged(before, wanted));
	if (leftovers != NIL)
	{
		rm_lock_relations(&run->locks, relations_that_exist(rm_dependents_relations(m, before)),
						  AccessExclusiveLock, run->tries);
		foreach(lc, leftovers)
			rm_execute(lfirst(lc));
	}
	rm_dependents_save(m, true, wanted);
	rm_dependents_save(m, false, rm_dependents_derive(m, false, CurrentMemoryContext));
	get_work(run)->planned = true;
	get_work(run)->by_leaf = m->by_leaf;
	m->phase = PHASE_MAKE;
}

/* shows in rm_progress what the next transaction will do; false if that was done */
static bool
announce(RmRun *run, const char *what)
{
	Swap	   *s = get_work(run);

	s->announced = !s->announced;
	if (s->announced)
	{
		run->wait_kind = "constraint";
		run->wait_reason = what;
	}
	return s->announced;
}

/*
 * The tables that ALTER TABLE changes when it makes a thing of a table: all below
 * it, if that inherits the thing.
 */
static List *
tables_of(const RmDependent *d)
{
	return strcmp(d->kind, "check constraint") == 0 ? rm_tree(d->relid) : rm_members(d->relid);
}

/* makes one thing, or has it made; its state is looked up again afterwards */
static void
make(RmRun *run, RmDependent *d, bool invalid, bool unvalidated)
{
	if (d->by_worker)
	{
		const char *name = quote_qualified_identifier(get_namespace_name(get_rel_namespace(d->relid)),
													  d->build_name);

		if (invalid)
			ask_worker(run, psprintf("DROP INDEX CONCURRENTLY %s", name),
					   "DROP INDEX CONCURRENTLY", d->relid, d->build_name);
		else
		{
			ask_worker(run, d->build_sql, "CREATE INDEX CONCURRENTLY", d->relid, d->name);
			get_work(run)->asked_index = true;
		}
	}
	else if (unvalidated)
	{
		/* a scan under a lock that lets everybody read and write */
		if (announce(run, psprintf("VALIDATE CONSTRAINT %s", quote_identifier(d->name))))
			return;
		rm_lock_relations(&run->locks, tables_of(d), ShareUpdateExclusiveLock, run->tries);
		rm_execute(d->validate_sql);
	}
	else if (strcmp(d->kind, "statistics") == 0)
	{
		rm_lock_relation(&run->locks, d->relid, ShareUpdateExclusiveLock);
		rm_execute(d->build_sql);
	}
	else
	{
		List	   *relids = tables_of(d);

		if (OidIsValid(d->peer))
			relids = list_concat_unique_oid(relids, rm_members(d->peer));
		rm_lock_relations(&run->locks, relids,
						  OidIsValid(d->peer) ? ShareRowExclusiveLock : AccessExclusiveLock,
						  run->tries);
		rm_execute(d->build_sql);
	}
}

/* the next thing that is missing, in the current memory context; NULL: none */
static RmDependent *
find_missing(RmRun *run, bool new_side, bool *invalid, bool *unvalidated)
{
	ListCell   *lc;

	foreach(lc, load_present(run->m, new_side))
	{
		RmDependent *d = lfirst(lc);

		CHECK_FOR_INTERRUPTS();
		if (d->build_name != NULL &&
			!rm_dependent_is_built(run->m, d, invalid, unvalidated) &&
			/* an inherited CHECK comes with the parent's, which is later in the list */
			(d->build_sql[0] != '\0' || *unvalidated))
			return d;
	}
	return NULL;
}

/* makes it; false if all is there */
static bool
make_next(RmRun *run, bool new_side)
{
	bool		invalid;
	bool		unvalidated;
	RmDependent *d = find_missing(run, new_side, &invalid, &unvalidated);

	if (d)
		make(run, d, invalid, unvalidated);
	return d != NULL;
}

/* 23503 if a foreign key that can be added only in the exchange would not hold */
static void
try_foreign_keys(RmRun *run, bool new_side)
{
	ListCell   *lc;

	foreach(lc, load_present(run->m, new_side))
	{
		RmDependent *d = lfirst(lc);

		if (d->build_name || d->build_sql == NULL)
			continue;
		rm_execute(d->build_sql);
		if (SPI_processed > 0)
			ereport(ERROR,
					(errcode(ERRCODE_FOREIGN_KEY_VIOLATION),
					 errmsg("the foreign key \"%s\" of %s would not hold for the new values of %s",
							d->name, rm_relation_sql(d->relid), run->m->relation),
					 errdetail("A row of %s has no row to refer to any more.", rm_relation_sql(d->relid)),
					 errhint("Change both columns so that they stay equal, or drop the foreign key; or take everything back with CALL rm_rollback(%lld).",
							 (long long) run->migration_id)));
	}
}

/* what is in force and still to be validated; true if there was something */
static bool
prove_next(RmRun *run, bool new_side)
{
	ListCell   *lc;

	foreach(lc, load_present(run->m, new_side))
	{
		RmDependent *d = lfirst(lc);
		bool		valid = true;
		HeapTuple	tup;

		if (d->build_name || d->validate_sql == NULL)
			continue;
		/* NULL if somebody has dropped it since */
		tup = SearchSysCache1(CONSTROID,
							  ObjectIdGetDatum(get_relation_constraint_oid(d->relid, d->name, true)));
		if (HeapTupleIsValid(tup))
		{
			valid = ((Form_pg_constraint) GETSTRUCT(tup))->convalidated;
			ReleaseSysCache(tup);
		}
		if (valid)
			continue;
		if (announce(run, psprintf("VALIDATE CONSTRAINT %s", quote_identifier(d->name))))
			return true;
		rm_lock_relation(&run->locks, d->relid, ShareUpdateExclusiveLock);
		rm_check_owner(run->m->relid, run->m->relation);
		rm_execute(d->validate_sql);
		rm_mark_parts_proven(run->m->relid);
		return true;
	}
	return false;
}

/*-------------------------------------------------------------------------
 * What a worker could not do
 *-------------------------------------------------------------------------
 */

/*
 * True to go on: where no worker was free (a parallel query may have them all
 * for a moment), and to drop what is left of an index that could not be built.
 * It would be looked after by every write until somebody calls the step again,
 * and a unique one would refuse writes that are right in the old column.
 */
static bool
build_retry(RmRun *run, ErrorData *error)
{
	Swap	   *s = run->work;
	MemoryContext oldcxt;

	if (s == NULL || s->raised)
		return false;
	/* a leaf was dropped while something was built on it: plan anew */
	if (s->by_leaf && s->failed == NULL && error->sqlerrcode == ERRCODE_UNDEFINED_TABLE &&
		s->gone++ < rm_lock_retries)
	{
		s->planned = false;
		return true;
	}
	if (s->asked && error->sqlerrcode == ERRCODE_INSUFFICIENT_RESOURCES)
	{
		s->no_worker = s->worker_tries++ < rm_lock_retries;
		return s->no_worker;
	}
	if (s->failed)
	{
		s->remains_done = true; /* they stay: the error is what matters */
		return true;
	}
	if (!s->asked_index ||
		ERRCODE_TO_CATEGORY(error->sqlerrcode) == ERRCODE_TO_CATEGORY(ERRCODE_QUERY_CANCELED))
		return false;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	s->failed = palloc0(sizeof(ErrorData));
	s->failed->sqlerrcode = error->sqlerrcode;
	s->failed->message = pstrdup(error->message);
	s->failed->detail = error->detail ? pstrdup(error->detail) : NULL;
	s->failed->hint = error->hint ? pstrdup(error->hint) : NULL;
	s->failed->context = error->context ? pstrdup(error->context) : NULL;
	MemoryContextSwitchTo(oldcxt);
	run->may_hold = false;
	return true;
}

/* drops the index that is there but not valid, at once */
static void
drop_remains(RmRun *run, bool new_side)
{
	RmMigration *m = run->m;
	bool		invalid;
	bool		unvalidated;
	RmDependent *d = find_missing(run, new_side, &invalid, &unvalidated);

	if (d == NULL || !d->by_worker || !invalid)
		return;
	rm_lock_relation(&run->locks, d->relid, AccessExclusiveLock);
	rm_check_owner(m->relid, m->relation);
	rm_execute(psprintf("DROP INDEX IF EXISTS %s",
						quote_qualified_identifier(get_namespace_name(get_rel_namespace(d->relid)),
												   d->build_name)));
}

/* at the beginning of a transaction that builds: true if it is for this alone */
static bool
after_worker_failure(RmRun *run, bool new_side)
{
	Swap	   *s = get_work(run);

	s->asked = s->asked_index = false;
	if (s->no_worker)
	{
		s->no_worker = false;
		run->pause_ms = WORKER_LOOK;
		run->wait_kind = "worker";
		run->wait_reason = "no background worker is free, all max_worker_processes are in use";
		return true;
	}
	if (s->failed == NULL)
		return false;
	if (!s->remains_done)
	{
		drop_remains(run, new_side);
		s->remains_done = true;
		return true;
	}
	s->raised = true;
	ereport(ERROR,
			(errcode(s->failed->sqlerrcode),
			 errmsg_internal("%s", s->failed->message),
			 s->failed->detail ? errdetail_internal("%s", s->failed->detail) : 0,
			 s->failed->hint ? errhint("%s", s->failed->hint) : 0,
			 s->failed->context ? errcontext("%s", s->failed->context) : 0));
	return true;				/* not reached */
}

/* how to go on when something could not be built */
static void
build_explain(RmRun *run, ErrorData *error)
{
	Swap	   *s = run->work;
	MemoryContext oldcxt;

	if (s == NULL || !(s->raised || s->copies.filling) || error->hint)
		return;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	error->hint =
		psprintf(error->sqlerrcode == ERRCODE_UNIQUE_VIOLATION ?
				 "Rows that differ in the old type are equal in the new one: mend them, then call it again (next_call in rm_migrations); or take everything back with CALL rm_rollback(%lld)." :
				 "When the cause is gone call it again (next_call in rm_migrations), it goes on where it is; or take everything back with CALL rm_rollback(%lld).",
				 (long long) run->migration_id);
	MemoryContextSwitchTo(oldcxt);
}

/*
 * Locks the table so that its definition stands still, and looks at it.  Of those
 * below it, which somebody always vacuums, it only keeps others from dropping
 * them: whether their definitions have stood still the fingerprint tells.
 */
static void
hold_definition(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;

	rm_lock_relation(&run->locks, m->relid, ShareUpdateExclusiveLock);
	if (m->by_leaf)
		rm_lock_tree(run, AccessShareLock);
	rm_check_owner(m->relid, m->relation);
	rel = table_open(m->relid, NoLock);
	rm_check_ground(m, rel);
	table_close(rel, NoLock);
}

/* are the catalogs as they were when the fingerprint was taken? */
static bool
catalogs_unchanged(const RmMigration *m)
{
	return m->fingerprint &&
		strcmp(m->fingerprint, rm_catalog_fingerprint(m->relid, CurrentMemoryContext)) == 0;
}

/* how often the step enforce_not_null has been done in vain since the last error */
static int
verifications_in_vain(const RmRun *run)
{
	Oid			types[] = {INT8OID, INT8OID};
	Datum		v[] = {Int64GetDatum(run->migration_id), Int64GetDatum(run->log_id)};

	rm_state_execute("SELECT count(*) FROM risky_migrations.step_log"
					 " WHERE migration_id = $1 AND step = 'enforce_not_null' AND id >"
					 " coalesce((SELECT max(id) FROM risky_migrations.step_log WHERE migration_id = $1"
					 " AND id <> $2 AND (state <> 'done' OR direction <> 'apply')), 0)",
					 2, types, v, NULL);
	return (int) rm_result_int64(0, 1);
}

/*
 * Children have come: the step enforce_not_null comes next, for these alone.  Each
 * time that is a run of its own, so how often is known by the log.
 */
static void
back_to_verification(RmRun *run)
{
	RmMigration *m = run->m;

	run->rounds = verifications_in_vain(run);
	rm_begin_again(run, psprintf("Each time tables that inherit from %s have come, or have been away, since all were verified.",
								 m->relation));
	ereport(NOTICE,
			(errmsg("migration %lld: tables that inherit from %s have come, or have been away, since all were verified; they are verified now",
					(long long) m->id, m->relation)));
	m->steps_done = RM_ENFORCE_NOT_NULL;
	m->phase = RM_PHASE_LATE_LEAVES;
	get_work(run)->goes_back = true;
}

/* somebody's DDL came in between: what is needed is to be planned anew */
static void
plan_again(RmRun *run)
{
	rm_begin_again(run, psprintf("Each time the definition of %s, of what hangs on it or of what is below it has changed meanwhile.",
								 run->m->relation));
	run->m->phase = PHASE_PLAN;
}

/* ANALYZE of all that have statistics of their own */
static const char *
analyze_sql(const RmMigration *m)
{
	StringInfoData buf;
	ListCell   *lc;

	initStringInfo(&buf);
	appendStringInfo(&buf, "ANALYZE %s", rm_relation_sql(m->relid));
	if (!RM_ANALYZE_DESCENDS && !rm_is_parted(m))
		foreach(lc, rm_tree_leaves(m->relid))
			/* a child may be dropped at any time: it is not locked */
			if (lfirst_oid(lc) != m->relid && get_rel_name(lfirst_oid(lc)) != NULL)
				appendStringInfo(&buf, ", %s", rm_relation_sql(lfirst_oid(lc)));
	return buf.data;
}

/* one transaction's worth of building on the new column; true when all is there */
static bool
build(RmRun *run)
{
	RmMigration *m = run->m;
	bool		invalid;
	bool		unvalidated;

	run->may_hold = true;
	if (after_worker_failure(run, true))
		return false;
	if (!get_work(run)->planned)
		m->phase = PHASE_PLAN;	/* a new run: what was planned may be old */
	switch (m->phase)
	{
		case PHASE_PLAN:
			if (rm_leaves_arm(run))
				return false;
			hold_definition(run);
			if (m->by_leaf)
				rm_leaves_accept_empty(run);
			if (rm_leaves_are_late(m))
				back_to_verification(run);
			else
				plan(run);
			return false;

		case PHASE_MAKE:
			rm_check_owner(m->relid, m->relation);
			if (!make_next(run, true))
				m->phase = PHASE_ANALYZE;
			return false;

		case PHASE_ANALYZE:
			rm_check_owner(m->relid, m->relation);
			try_foreign_keys(run, true);
			ask_worker(run, analyze_sql(m), "ANALYZE", m->by_leaf ? InvalidOid : m->relid, NULL);
			m->phase = PHASE_CHECK;
			return false;

		default:
			hold_definition(run);
			m->fingerprint = rm_catalog_fingerprint(m->relid, CurrentMemoryContext);
			if (!rm_dependents_equal(rm_dependents_load(m, true, CurrentMemoryContext),
									 rm_dependents_derive(m, true, CurrentMemoryContext)) ||
				find_missing(run, true, &invalid, &unvalidated) ||
				!catalogs_unchanged(m))
			{
				plan_again(run);
				return false;
			}
			return true;
	}
}

static RmStepResult
build_apply(RmRun *run)
{
	if (build(run))
		return RM_STEP_DONE;
	return get_work(run)->goes_back ? RM_STEP_BACK : RM_STEP_AGAIN;
}

static void
build_committed(RmRun *run, RmStepResult result)
{
	if (!run->revert && result == RM_STEP_DONE)
		ereport(NOTICE,
				(errmsg("migration %lld: what hangs on the column is built on the new one, nothing is in the way of the swap",
						(long long) run->migration_id)));
}

/* everything that was built goes */
static void
drop_built(RmRun *run, bool new_side)
{
	RmMigration *m = run->m;
	List	   *list = load_present(m, new_side);
	List	   *commands = rm_dependents_leftovers(m, new_side, NIL);	/* nobody else makes such */
	ListCell   *lc;

	rm_lock_relations(&run->locks, rm_dependents_relations(m, list), AccessExclusiveLock,
					  run->tries);
	rm_check_owner(m->relid, m->relation);
	foreach(lc, commands)
		rm_execute(lfirst(lc));
	rm_dependents_save(m, new_side, NIL);
}

static RmStepResult
build_revert(RmRun *run)
{
	drop_built(run, true);
	rm_dependents_save(run->m, false, NIL);
	run->m->fingerprint = NULL;
	return RM_STEP_DONE;
}

const RmStep rm_step_build = {
	.name = "build",
	.apply = build_apply,
	.revert = build_revert,
	.committed = build_committed,
	.retry = build_retry,
	.explain = build_explain,
};

/*-------------------------------------------------------------------------
 * Waiting for snapshots
 *-------------------------------------------------------------------------
 */

/* waits for older snapshots; true when they are gone, an error after too long */
static bool
wait_for_snapshots(RmRun *run)
{
	return rm_wait_for_snapshots(run, &get_work(run)->snapshots, "the columns from being exchanged",
								 "with it, it would find rows without a value in the column that takes the place",
								 psprintf("CALL %s(%lld) again", run->revert ? "rm_rollback" : "rm_swap",
										  (long long) run->migration_id));
}

/*-------------------------------------------------------------------------
 * The exchange
 *-------------------------------------------------------------------------
 */

/* nothing may still read the column that has gone aside (55000) */
static void
check_nothing_left_behind(const RmMigration *m, AttrNumber attnum)
{
	Oid			types[] = {OIDOID, INT2OID};
	Datum		v[] = {ObjectIdGetDatum(m->relid), Int16GetDatum(attnum)};

	rm_catalog_query("SELECT pg_catalog.string_agg(l, ', ')"
					 " FROM risky_migrations.column_left_behind($1, $2) l",
					 2, types, v);
	if (!rm_result_isnull(0, 1))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("something would still read the old column after the swap"),
				 errdetail("It knows the column by its position: %s.", rm_result_text(0, 1)),
				 errhint("Drop it, and create it again after the migration.")));
}

static void
rename_column(const RmMigration *m, const char *from, const char *to)
{
	rm_execute(psprintf("%s RENAME COLUMN %s TO %s", rm_alter_sql(m),
						quote_identifier(from), quote_identifier(to)));
}

/* the columns change their names: from the old to the new one, or back */
void
rm_swap_names(const RmMigration *m, bool forward)
{
	rename_column(m, m->column, forward ? m->old_column : m->new_column);
	rename_column(m, forward ? m->new_column : m->old_column, m->column);
}

/*
 * What is in force goes, last things first.  NOT NULL is the first thing: it goes
 * from the table and then from partitions that have it of their own too, as a
 * primary key makes it from 18 on.
 */
static void
put_out_of_force(RmRun *run, List *list, bool forward)
{
	RmMigration *m = run->m;
	ListCell   *lc;

	for (int i = list_length(list) - 1; i >= 0; i--)
	{
		RmDependent *d = list_nth(list, i);

		if (strcmp(d->kind, "identity") == 0)
			rm_move_identity(d->relid,
							 rm_leaf_attnum(m->relid, forward ? m->attnum : m->new_attnum, d->relid),
							 rm_leaf_attnum(m->relid, forward ? m->new_attnum : m->attnum, d->relid),
							 d->peer);
		else if (d->drop_sql && strcmp(d->kind, "not null") != 0)
			rm_execute(d->drop_sql);
	}
	foreach(lc, list)
	{
		RmDependent *d = lfirst(lc);

		if (strcmp(d->kind, "not null") == 0)
			rm_execute(d->drop_sql);
	}
}

/* what can be made only now, while the columns still have other names */
static void
make_between(List *list)
{
	ListCell   *lc;

	foreach(lc, list)
		if (((RmDependent *) lfirst(lc))->make_sql)
			rm_execute(((RmDependent *) lfirst(lc))->make_sql);
}

static void
put_in_force(RmRun *run, List *list, bool forward)
{
	RmMigration *m = run->m;
	ListCell   *lc;
	ListCell   *cmd;

	foreach(lc, list)
	{
		RmDependent *d = lfirst(lc);

		foreach(cmd, d->take_sql)
			rm_execute(lfirst(cmd));
		if (strcmp(d->kind, "not null") == 0)
			rm_name_not_null(d, rm_leaf_attnum(m->relid, forward ? m->new_attnum : m->attnum,
											   d->relid));
	}
}

/*
 * What the exchange has to know of the catalogs.  To read all that takes longer than
 * to do it.  So it is read before the strong locks, under SHARE UPDATE EXCLUSIVE on
 * all that it tells of: others read and write, but whoever would change a definition
 * waits.  What that lock does not hold still (privileges, comments, a new view) is known
 * by the marks, and the functions of the expression, on which there is no lock, by
 * theirs.
 */
struct RmExchange
{
	List	   *relids;			/* to be locked */
	List	   *marks;			/* of them, see rm_relation_marks() */
	uint64		expression_mark;	/* see rm_expression_mark() */
	List	   *definitions;
	List	   *copies;
};

/* the columns change places, with all that hangs on them; the locks are held */
static void
exchange(RmRun *run, List *list, const RmExchange *e, bool forward)
{
	RmMigration *m = run->m;

	rm_definitions_drop(e->definitions);
	put_out_of_force(run, list, forward);
	make_between(list);
	rm_swap_names(m, forward);
	rm_swap_definers(m);
	put_in_force(run, list, forward);
	rm_definitions_make(e->definitions, e->copies);

	check_nothing_left_behind(m, forward ? m->attnum : m->new_attnum);
	m->swapped = forward;
	if (forward)
		rm_release_shadow_column(m);
	else
	{
		rm_bind_shadow_column(m);
		m->trigger_xmin = 0;	/* what was verified before is worth nothing now */
		rm_leaves_reset(m);
	}
	/* the sync trigger of every session must read its direction again */
	rm_invalidate_tree(m);
}

/* a rehearsal of the exchange */
typedef struct Rehearsal
{
	RmMigration *m;
	MemoryContext cxt;
	RmExchange *e;
} Rehearsal;

/* the part of the exchange that nothing has been built for */
static void
rehearse_exchange(void *arg)
{
	Rehearsal  *r = arg;

	rm_definitions_drop(r->e->definitions);
	rm_swap_names(r->m, true);
	rm_definitions_make(r->e->definitions, NIL);
	check_nothing_left_behind(r->m, r->m->attnum);
}

static void
rehearse_copies(void *arg)
{
	Rehearsal  *r = arg;

	rm_copies_rehearse(r->m, r->e->copies);
}

static void
read_for_rehearsal(void *arg)
{
	Rehearsal  *r = arg;
	List	   *attnums = list_make1_int(r->m->attnum);
	MemoryContext oldcxt = MemoryContextSwitchTo(r->cxt);

	r->e = palloc0(sizeof(RmExchange));
	/* those below the table are about to get a column from it */
	r->e->relids = list_difference_oid(rm_relations_of_definitions(r->m, attnums),
									   rm_tree(r->m->relid));
	r->e->marks = rm_relation_marks(r->e->relids);
	r->e->definitions = rm_definitions_on(r->m, attnums);
	r->e->copies = rm_copies_wanted(r->m, true);
	MemoryContextSwitchTo(oldcxt);
}

/*
 * What rm_swap_rehearse() is to try; NULL if there is nothing.  To be asked before the
 * table is locked: reading all that may hang on a column takes longer than all the
 * rest of what is done under that lock.  No lock remains.
 */
RmExchange *
rm_swap_to_be_rehearsed(RmMigration *m)
{
	Rehearsal	r = {.m = m,.cxt = CurrentMemoryContext};
	ErrorData  *error = rm_rehearse(read_for_rehearsal, &r, CurrentMemoryContext);

	if (error)
		ReThrowError(error);
	return r.e->definitions == NIL ? NULL : r.e;
}

/*
 * Tries whether views, rules, policies and triggers can be made again on the
 * new column, as soon as that exists; nothing of it stays.  The relations are
 * locked only if they are free at once (55P03).  A view that needs the primary
 * key can only be made when that is built: there the swap itself must tell; but
 * not if a materialized view reads it, which is made before.
 */
void
rm_swap_rehearse(RmRun *run, RmExchange *e)
{
	RmMigration *m = run->m;
	Rehearsal	r = {.m = m,.e = e};
	ErrorData  *error = NULL;

	rm_lock_relations(&run->locks, lcons_oid(m->relid, list_copy(e->relids)), AccessExclusiveLock, 0);
	if (!equal(e->marks, rm_relation_marks(e->relids)))
		rm_refuse_just_changed(m);
	if (e->copies != NIL)
		error = rm_rehearse(rehearse_copies, &r, CurrentMemoryContext);
	if (error && error->sqlerrcode == ERRCODE_GROUPING_ERROR)
	{
		error->detail = psprintf("A materialized view on column \"%s\" of %s has to be filled before the primary key is on the new column.",
								 m->column, m->relation);
		error->hint = "Name in its GROUP BY, and in those of the views that it reads, all columns that are selected.";
	}
	if (error == NULL)
		error = rm_rehearse(rehearse_exchange, &r, CurrentMemoryContext);
	if (error == NULL || (error->sqlerrcode == ERRCODE_GROUPING_ERROR && error->hint == NULL))
		return;
	if (error->detail == NULL)
		error->detail = psprintf("It hangs on column \"%s\" of %s, and cannot be made again when the column has the type %s.",
								 m->column, m->relation, m->new_type);
	if (error->hint == NULL)
		error->hint = "Drop or change it first.";
	ReThrowError(error);
}

/* holds all relations still that the exchange changes, the table among them */
static RmExchange *
hold_still(RmRun *run, List *list, bool forward)
{
	RmMigration *m = run->m;
	RmExchange *e = palloc0(sizeof(RmExchange));
	AttrNumber	attnum = forward ? m->attnum : m->new_attnum;
	List	   *relids = list_concat_unique_oid(rm_dependents_relations(m, list),
												rm_relations_of_definitions(m, list_make1_int(attnum)));
	Relation	rel;

	relids = list_concat_unique_oid(relids, rm_copies_there(m, forward));
	rm_lock_relations(&run->locks, relids, ShareUpdateExclusiveLock, run->tries);
	/* before anything else is read */
	e->relids = relids;
	e->marks = rm_relation_marks(relids);
	e->expression_mark = rm_expression_mark(m);
	/* a view or a partition that was made before we had the locks: again */
	if (list_difference_oid(rm_relations_of_definitions(m, list_make1_int(attnum)), relids) != NIL ||
		list_difference_oid(rm_tree(m->relid), relids) != NIL)
		rm_refuse_just_changed(m);
	rm_check_owner(m->relid, m->relation);
	rel = table_open(m->relid, NoLock);
	rm_check_ground(m, rel);
	table_close(rel, NoLock);
	return e;
}

/* reads the rest; then nobody else comes to these relations */
static void
lock_for_exchange(RmRun *run, RmExchange *e, bool forward)
{
	RmMigration *m = run->m;

	e->definitions = rm_definitions_on(m, list_make1_int(forward ? m->attnum : m->new_attnum));
	e->copies = rm_copies_wanted(m, forward);
	rm_lock_relations(&run->locks, e->relids, AccessExclusiveLock, run->tries);
	if (!equal(e->marks, rm_relation_marks(e->relids)) ||
		e->expression_mark != rm_expression_mark(m))
		rm_refuse_just_changed(m);
}

/* one transaction's worth of work on materialized views; true when they are filled */
static bool
fill_copies(RmRun *run, bool forward)
{
	RmCopies   *copies = &get_work(run)->copies;
	if (copies->state == NULL)
	{
		if (!rm_copies_lock(run, forward))
		{
			copies->state = MemoryContextStrdup(run->cxt, "");
			return true;
		}
		if (forward && !catalogs_unchanged(run->m))
		{
			plan_again(run);
			return false;
		}
		rm_copies_make(run, copies, forward);
		/* columns had other names for a moment */
		if (forward)
			run->m->fingerprint = rm_catalog_fingerprint(run->m->relid, CurrentMemoryContext);
		return false;
	}
	if (copies->filling)
	{
		rm_copies_fill(run, copies);
		return false;
	}
	return !rm_copies_choose(run, copies, forward);
}

/* after the exchange: is anything of it still to be validated? */
static bool
to_be_proven(RmRun *run, List *list)
{
	ListCell   *lc;

	foreach(lc, list)
	{
		RmDependent *d = lfirst(lc);

		if (d->build_name == NULL && d->validate_sql)
		{
			run->m->phase = PHASE_PROVE;
			return true;
		}
	}
	return false;
}

/* has a materialized view been refreshed, or changed, since its copy was made? */
static bool
refill_needed(RmRun *run, bool forward)
{
	RmCopies   *copies = &get_work(run)->copies;

	if (rm_copies_good(run->m, copies, forward))
		return false;
	copies->state = NULL;
	run->m->phase = PHASE_FILL;
	return true;
}

static RmStepResult
swap_apply(RmRun *run)
{
	RmMigration *m = run->m;
	List	   *list;
	RmExchange *e;

	if (m->swapped)
		return prove_next(run, true) ? RM_STEP_AGAIN : RM_STEP_DONE;
	if (!get_work(run)->planned || m->phase < PHASE_WAIT)
	{
		if (build(run))
			m->phase = PHASE_WAIT;
		return get_work(run)->goes_back ? RM_STEP_BACK : RM_STEP_AGAIN;
	}
	if (m->phase == PHASE_WAIT)
	{
		if (wait_for_snapshots(run))
			m->phase = PHASE_FILL;
		return RM_STEP_AGAIN;
	}
	if (m->phase == PHASE_FILL)
	{
		if (fill_copies(run, true))
			m->phase = PHASE_EXCHANGE;
		return RM_STEP_AGAIN;
	}

	rm_lock_check_room(m->method->name, m->relid, m->columns, m->id);
	list = load_present(m, true);
	e = hold_still(run, list, true);
	if (!catalogs_unchanged(m))
	{
		plan_again(run);
		return RM_STEP_AGAIN;
	}
	refuse_unverified(m);
	if (refill_needed(run, true))
		return RM_STEP_AGAIN;
	lock_for_exchange(run, e, true);
	run->old_storage = rm_relation_storage(m->relid);
	exchange(run, list, e, true);
	return to_be_proven(run, list) ? RM_STEP_AGAIN : RM_STEP_DONE;
}

static void
swap_committed(RmRun *run, RmStepResult result)
{
	if (result != RM_STEP_DONE)
		return;
	if (run->revert)
		ereport(NOTICE,
				(errmsg("migration %lld: the columns have changed places again",
						(long long) run->migration_id)));
	else
		ereport(NOTICE,
				(errmsg("migration %lld: the columns have changed places; the old one is kept for the way back",
						(long long) run->migration_id),
				 errhint("CALL rm_cleanup(%lld) drops it when it is not needed any more; CALL rm_rollback(%lld) goes back.",
						 (long long) run->migration_id, (long long) run->migration_id)));
}

/*-------------------------------------------------------------------------
 * The way back
 *-------------------------------------------------------------------------
 */

/* is there a record of a value that did not fit the old type? */
static bool
misfits_recorded(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("SELECT 1 FROM risky_migrations.conversion_error"
					 " WHERE migration_id = $1 AND way_back LIMIT 1", 1, types, v, NULL);
	return SPI_processed > 0;
}

static void
forget_misfits(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("DELETE FROM risky_migrations.conversion_error"
					 " WHERE migration_id = $1 AND way_back", 1, types, v, NULL);
}

/* one transaction's look at the way back */
typedef struct Look
{
	RmRows	   *rows;
	RmConversion *forth;		/* what the new value was made with */
	int64		unfit;
	int64		mended;
} Look;

/* gives the row in hand its old value again */
static void
mend_row(Look *look, Datum value)
{
	RmRows	   *rows = look->rows;
	bool		hot;

	(void) rm_row_make(rows, value, false);
	switch (rm_row_store(rows, false, &hot))
	{
		case TM_Ok:
			look->mended++;
			break;
		case TM_Updated:
		case TM_Deleted:
			break;				/* the trigger has seen to its successor */
		default:
			ereport(ERROR,
					(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
					 errmsg("row %s of %s is locked by another transaction",
							rm_row_key(rows->rel, rows->slot), rows->m->relation),
					 errdetail("It has to be mended, and is not waited for while others are locked."),
					 errhint("Call it again when that transaction has ended.")));
	}
}

/*
 * Is the row in hand without the old value that it should have?  A NULL that
 * gives the new value is right.  Otherwise the old value is made now, if that can
 * be done (what was in the way then may be gone), or the row is recorded.
 */
static void
look_at_row(Look *look)
{
	RmRows	   *rows = look->rows;
	RmMigration *m = rows->m;
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rows->rel), m->new_attnum - 1);
	Datum		now;
	Datum		value;
	bool		isnull;
	ErrorData  *error;

	(void) slot_getattr(rows->slot, m->attnum, &isnull);
	if (!isnull)
		return;
	now = slot_getattr(rows->slot, m->new_attnum, &isnull);
	if (isnull)
		return;
	if (rm_conversion_try(look->forth, rows->slot, rows->row_cxt, &value, &isnull, &error) &&
		!isnull && datum_image_eq(value, now, att->attbyval, att->attlen))
		return;
	if (!rm_row_convert(rows, true, &value, &isnull, &error))
	{
		rm_row_record_failure(rows, error);
		look->unfit++;
	}
	else if (!isnull)
		mend_row(look, value);
}

/* looks at the rows of some pages; returns the page to go on with */
static BlockNumber
look_at_pages(Look *look, BlockNumber block, BlockNumber end)
{
	BlockNumber stop = Min((int64) end, (int64) block + CHECK_PAGES);

	/* a row that was mended is locked: commit soon */
	while (block < stop && look->mended == 0)
	{
		OffsetNumber offsets[MaxHeapTuplesPerPage];
		Buffer		buf;
		int			n;
		int			dead;

		CHECK_FOR_INTERRUPTS();
		buf = ReadBuffer(look->rows->rel, block++);
		n = rm_rows_on_page(look->rows, buf, false, offsets, &dead);
		for (int i = 0; i < n; i++)
		{
			rm_row_get(look->rows, buf, offsets[i]);
			look_at_row(look);
		}
		ReleaseBuffer(buf);
	}
	return block;
}

/* the leaf with the next OID, InvalidOid if there is none */
static Oid
leaf_after(const RmMigration *m, Oid leaf)
{
	Oid			next = InvalidOid;
	ListCell   *lc;

	foreach(lc, rm_tree_leaves(m->relid))
		if (lfirst_oid(lc) > leaf && (!OidIsValid(next) || lfirst_oid(lc) < next))
			next = lfirst_oid(lc);
	return next;
}

/* locks and opens a leaf whose rows are to be looked at; NULL if it is none any more */
static Relation
open_leaf(RmRun *run, Oid leaf)
{
	Relation	rel;

	if (leaf == run->m->relid)
		rm_lock_relation(&run->locks, leaf, RowExclusiveLock);
	else if (!rm_lock_relation_if_there(&run->locks, leaf, RowExclusiveLock))
		return NULL;
	rel = table_open(leaf, NoLock);
	if (rm_is_leaf_of(rel, run->m->relid))
		return rel;
	table_close(rel, NoLock);
	return NULL;
}

/*
 * Records are hints, since rows may have been mended or deleted: looks at a
 * range of the rows themselves.  Those that are there at the beginning are
 * deleted (their rows are visible to us then), and made again for each row that
 * does not fit; what writers add meanwhile stays.  True at the end of the table.
 * Until all has been seen the phase says so: a later run must begin again.
 */
static bool
look_for_misfits(RmRun *run)
{
	RmMigration *m = run->m;
	RmMigration forth;
	Swap	   *s = get_work(run);
	Look		look = {0};
	Relation	rel;
	BlockNumber end;

	m->phase = PHASE_LOOK;
	if (!OidIsValid(s->leaf))
	{
		forget_misfits(m);
		s->unfit = 0;
		s->leaf = leaf_after(m, InvalidOid);
	}
	if (!OidIsValid(s->leaf))
	{
		m->trigger_xmin = rm_trigger_xmin(m);	/* all partitions are gone */
		return true;
	}
	rel = open_leaf(run, s->leaf);
	if (rel == NULL)
	{
		/* dropped or detached meanwhile */
		rm_leaf_adopt(m, NULL);
		s->next_block = 0;
		s->leaf = leaf_after(m, s->leaf);
		return !OidIsValid(s->leaf);
	}
	/* a child that has come just now gets its trigger first */
	if (rm_leaf_is_unarmed(m, s->leaf))
	{
		table_close(rel, NoLock);
		return false;
	}
	forth = *rm_migration_on(m, rel);
	rm_check_ground(&forth, rel);
	look.rows = rm_rows_open(m, rel, RM_ROWS_MANY);
	forth.swapped = false;
	look.forth = rm_migration_conversion(&forth, rel, CurrentMemoryContext);
	look.forth->settings_fixed = true;
	end = RelationGetNumberOfBlocks(rel);
	s->next_block = look_at_pages(&look, s->next_block, end);
	s->unfit += look.unfit;
	FreeExprContext(look.forth->econtext, true);
	rm_rows_close(look.rows);
	if (s->next_block >= end)
		rm_leaf_adopt(m, rel);
	table_close(rel, NoLock);
	if (s->next_block < end)
		return false;
	s->next_block = 0;
	s->leaf = leaf_after(m, s->leaf);
	return !OidIsValid(s->leaf);
}

static void
refuse_way_back(const RmMigration *m, const char *reason, bool can_be_mended)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("the way back of migration %lld is closed", (long long) m->id),
			 errdetail("%s", reason),
			 can_be_mended ?
			 errhint("Mend the rows that SELECT * FROM rm_conversion_errors shows, then call it again; or stay with the new column: CALL rm_cleanup(%lld).",
					 (long long) m->id) :
			 errhint("Stay with the new column: CALL rm_cleanup(%lld).", (long long) m->id)));
}

/*
 * Has no row been written without the trigger since all were verified?  Leaves may
 * have come since: these are looked through.
 */
static bool
is_watched(RmMigration *m)
{
	return m->trigger_xmin == rm_trigger_xmin(m) ||
		(m->by_leaf && rm_leaves_watched(m));
}

/* 55000 with the reason if there is no way back */
static void
refuse_closed_way(RmRun *run)
{
	RmMigration *m = run->m;
	Swap	   *s = get_work(run);

	if (m->reverse_tree == NULL)
		refuse_way_back(m, rm_reads_other_columns(m) && m->reverse_expr == NULL ?
						psprintf("%s reads other columns too, and no reverse_expr was given.",
								 m->using_expr) :
						psprintf("There is no cast from %s to %s, and no reverse_expr was given.",
								 m->new_type, m->old_type), false);
	if (!is_watched(m))
		refuse_way_back(m, "The sync trigger has been dropped or switched off for a while, or a function of the expression replaced: the old column may have missed values.", false);
	if (s->unfit > 0)
		refuse_way_back(m, psprintf("%lld rows of %s hold a value that does not fit the type %s.",
									(long long) s->unfit, m->relation, m->old_type), true);
}

/* 55000 if names have changed since the swap: what was planned then uses them */
static void
refuse_renamed(const RmMigration *m)
{
	char	   *now = psprintf("%s with the columns %s and %s", rm_relation_sql(m->relid),
							   quote_identifier(get_attname(m->relid, m->new_attnum, false)),
							   quote_identifier(get_attname(m->relid, m->attnum, false)));
	char	   *then = psprintf("%s with the columns %s and %s", m->relation,
								quote_identifier(m->column), quote_identifier(m->old_column));

	if (strcmp(now, then) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("names have changed since the swap of migration %lld", (long long) m->id),
				 errdetail("It was %s, and is %s.", then, now),
				 errhint("Give them the names that they had, call it again, and rename them then.")));
}

/* what hangs on the new column now but did not hang on the old one */
static void
refuse_new_dependents(RmRun *run, List *list)
{
	RmMigration *m = run->m;
	Oid			types[] = {OIDOID, INT2OID, TEXTARRAYOID, TEXTOID};
	Datum		v[4];
	List	   *names = NIL;
	ListCell   *lc;

	foreach(lc, list)
		names = lappend(names, ((RmDependent *) lfirst(lc))->name);
	v[0] = ObjectIdGetDatum(m->relid);
	v[1] = Int16GetDatum(m->new_attnum);
	v[2] = rm_settings_array(names);
	v[3] = CStringGetTextDatum(rm_built_prefix(m, true));
	rm_catalog_query("SELECT string_agg(pg_catalog.format('%s %s', kind, name), ', ')"
					 " FROM risky_migrations.member_columns($1, ARRAY[$2]) m, LATERAL"
					 " risky_migrations.dependents(m.member, m.number, 0::smallint, m.member, m.number, '', '', $4)"
					 " WHERE coalesce(build_name, build_sql, make_sql, validate_sql) IS NOT NULL"
					 " AND kind <> 'not null' AND name <> ALL ($3)"
					 /* what another migration keeps for its own way back */
					 " AND name !~ '^rm_[no]_[0-9]+_[0-9]+$'",
					 4, types, v);
	if (!rm_result_isnull(0, 1))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("something has been added to the new column since the swap"),
				 errdetail("On it are: %s.", rm_result_text(0, 1)),
				 errhint("Drop it first; on the way back it has no counterpart.")));
}

/* before anything is changed: is there a way back? */
static bool
way_back_is_open(RmRun *run)
{
	RmMigration *m = run->m;
	Swap	   *s = get_work(run);
	List	   *list;

	rm_check_owner(m->relid, m->relation);
	if (m->reverse_tree == NULL || !is_watched(m))
		refuse_closed_way(run);
	if (m->trigger_xmin != rm_trigger_xmin(m))
		s->looked = false;		/* a partition has come, or one has gone */
	if (!s->looked && (m->phase == PHASE_LOOK || misfits_recorded(m) ||
					   m->trigger_xmin != rm_trigger_xmin(m)))
	{
		s->looked = look_for_misfits(run);
		return false;			/* refused, if at all, when the records are committed */
	}
	refuse_closed_way(run);
	list = rm_dependents_load(m, false, CurrentMemoryContext);
	if (m->by_leaf)
	{
		rm_lock_tree(run, AccessShareLock);
		list = rm_dependents_add_members(m, list, CurrentMemoryContext);
		rm_dependents_save(m, false, list);
	}
	refuse_new_dependents(run, list);
	refuse_renamed(m);
	s->planned = true;
	s->by_leaf = m->by_leaf;
	m->phase = PHASE_MAKE;
	return true;
}

/* something has come since we looked */
static void
look_again(RmRun *run)
{
	rm_begin_again(run, psprintf("Each time values that do not fit the old type have been written to %s meanwhile, or what is below it has changed.",
								 run->m->relation));
	memset(get_work(run), 0, sizeof(Swap));
}

static RmStepResult
swap_revert(RmRun *run)
{
	RmMigration *m = run->m;
	List	   *list;
	RmExchange *e;
	ListCell   *lc;

	run->back_to = RM_BUILD;	/* what was built on the new column is not there any more */
	if (!m->swapped)			/* it had only begun, or is taken back but for that */
		return m->phase == PHASE_PROVE && prove_next(run, false) ? RM_STEP_AGAIN : RM_STEP_DONE;
	if (!get_work(run)->planned)
	{
		if (!rm_leaves_arm(run))
			(void) way_back_is_open(run);
		return RM_STEP_AGAIN;
	}
	if (m->phase != PHASE_EXCHANGE)
	{
		if (after_worker_failure(run, false))
			return RM_STEP_AGAIN;
		rm_check_owner(m->relid, m->relation);
		/* who has an old snapshot would find no value in rows that were mended */
		if (!make_next(run, false) &&
			(!get_work(run)->looked || wait_for_snapshots(run)))
		{
			refuse_renamed(m);
			if (fill_copies(run, false))
				m->phase = PHASE_EXCHANGE;
		}
		return RM_STEP_AGAIN;
	}

	list = load_present(m, false);
	e = hold_still(run, list, false);
	refuse_renamed(m);
	if (m->trigger_xmin != rm_trigger_xmin(m) || misfits_recorded(m))
	{
		look_again(run);		/* without the lock */
		return RM_STEP_AGAIN;
	}
	/* since it was planned somebody may have added an index, which would go with the column */
	refuse_new_dependents(run, rm_dependents_load(m, false, CurrentMemoryContext));
	if (refill_needed(run, false))
		return RM_STEP_AGAIN;
	lock_for_exchange(run, e, false);
	if (misfits_recorded(m))
	{
		look_again(run);		/* by somebody who wrote until then */
		return RM_STEP_AGAIN;
	}
	run->old_storage = rm_relation_storage(m->relid);
	exchange(run, list, e, false);
	/* what was kept on the old column and is not needed any more */
	foreach(lc, rm_dependents_leftovers(m, false, NIL))
		rm_execute(lfirst(lc));
	forget_misfits(m);
	return to_be_proven(run, list) ? RM_STEP_AGAIN : RM_STEP_DONE;
}

/*
 * The way back has failed while the new column is in force: what was built for
 * the old one and could refuse a write goes again, plain indexes stay.  What a
 * crash leaves of it goes when rm_rollback() or rm_cleanup() is called.
 */
static void
disarm_way_back(void *arg)
{
	RmRun	   *run = arg;
	RmMigration *m = rm_migration_load(run->migration_id, true, CurrentMemoryContext);
	List	   *list = load_present(m, false);
	List	   *harmless = NIL;
	List	   *commands;
	ListCell   *lc;

	rm_lock_bound_waits();
	if (!m->swapped || !SearchSysCacheExists1(RELOID, ObjectIdGetDatum(m->relid)))
		return;
	foreach(lc, list)
	{
		RmDependent *d = lfirst(lc);

		if (strcmp(d->kind, "statistics") == 0 ||
			(d->by_worker && strncmp(d->build_sql, "CREATE UNIQUE", 13) != 0))
			harmless = lappend(harmless, d);
	}
	commands = rm_dependents_leftovers(m, false, harmless);
	if (commands == NIL)
		return;
	rm_lock_relations(&run->locks, rm_dependents_relations(m, list), AccessExclusiveLock,
					  run->tries);
	foreach(lc, commands)
		rm_execute(lfirst(lc));
}

static void
swap_explain(RmRun *run, ErrorData *error)
{
	Swap	   *s = run->work;
	ErrorData  *failure = NULL;

	if (s && s->copies.filling && error->detail == NULL)
		error->detail = MemoryContextStrdup(run->cxt,
											psprintf("A copy of materialized view %s was being filled, which is to take its place.",
													 s->copies.filling));
	if (!run->revert)
	{
		build_explain(run, error);
		return;
	}
	for (run->tries = 0; run->tries <= rm_lock_retries; run->tries++)
	{
		failure = rm_between(run, disarm_way_back, run);
		if (failure == NULL || failure->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
			break;
		if (rm_rest(run, SNAPSHOT_LOOK) != NULL)
			break;
	}
	if (error->hint == NULL)
		error->hint = MemoryContextStrdup(run->cxt,
										  psprintf("Mend what is in the way, then CALL rm_rollback(%lld) again; or stay with the new column: CALL rm_cleanup(%lld).%s",
												   (long long) run->migration_id,
												   (long long) run->migration_id,
												   failure ? "  Until then constraints that were built for the way back may refuse writes." : ""));
}

const RmStep rm_step_swap = {
	.name = "swap",
	.cuts_over = true,
	.apply = swap_apply,
	.revert = swap_revert,
	.committed = swap_committed,
	.retry = build_retry,
	.explain = swap_explain,
};

/*-------------------------------------------------------------------------
 * cleanup
 *-------------------------------------------------------------------------
 */

static RmStepResult
cleanup_apply(RmRun *run)
{
	RmMigration *m = run->m;
	List	   *commands = rm_dependents_leftovers(m, false, NIL);	/* nobody else makes such */
	ListCell   *lc;

	/* a way back that was interrupted may have left foreign keys of others */
	rm_lock_relations(&run->locks, m->phase == 0 ? rm_tree(m->relid) :
					  rm_dependents_relations(m, load_present(m, false)),
					  AccessExclusiveLock, run->tries);
	rm_check_owner(m->relid, m->relation);
	run->old_storage = rm_relation_storage(m->relid);
	foreach(lc, commands)
		rm_execute(lfirst(lc));
	rm_drop_trigger_and_column(m, m->attnum);
	rm_dependents_save(m, true, NIL);
	rm_dependents_save(m, false, NIL);
	rm_leaves_forget(m);
	forget_misfits(m);
	return RM_STEP_DONE;
}

static void
cleanup_committed(RmRun *run, RmStepResult result)
{
	if (result == RM_STEP_DONE)
		ereport(NOTICE,
				(errmsg("migration %lld is done, the old column is gone",
						(long long) run->migration_id)));
}

/* what is dropped does not come back */
static RmStepResult
cleanup_revert(RmRun *run)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("migration %lld cannot be taken back any more",
					(long long) run->migration_id),
			 errdetail("Its old column was dropped by rm_cleanup()."),
			 errhint("Start another migration, to the former type.")));
}

const RmStep rm_step_cleanup = {
	.name = "cleanup",
	.on_request = true,
	.apply = cleanup_apply,
	.revert = cleanup_revert,
	.committed = cleanup_committed,
};
