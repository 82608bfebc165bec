/*-------------------------------------------------------------------------
 *
 * matviews.c
 *	  Materialized views on the column: filled again beside their readers.
 *
 * A materialized view stores what it has read, in the type that the column had.
 * Filling it takes as long as its query does, which nobody is to wait for: not
 * those who read the table, as they would if it were filled in the exchange, and
 * not those who read the view, which between the exchange and a REFRESH
 * afterwards would be "not populated", an error.  So it is treated as an index
 * is: another one is made on the column that is going to take the place, under a
 * name of ours (rm_n_<migration>_<OID of the original>, rm_o_... on the way
 * back), filled while all read the one in force, and takes its name in the
 * exchange.
 *
 *	make		copies of all materialized views on the column, empty, and of the
 *				views that they read, for a copy must not read a view that the
 *				exchange has to drop.  For this one transaction, under ACCESS
 *				EXCLUSIVE, everything gets the names that it will have: the
 *				columns change places, the originals go aside, and each
 *				definition is executed as it stands, lowest first, and finds what
 *				it means.  Then all names go back; what was made keeps knowing
 *				by number what it was made on.  No text is looked into.
 *	fill		REFRESH and ANALYZE of each copy, lowest first, in a transaction of
 *				its own, as long as it takes.  Nobody knows of the copy.
 *	exchange	(swap.c) the originals are dropped and the copies take their names.
 *
 * What is not populated is not filled.  REFRESH stores rows as frozen, so
 * that also those find them who have an older snapshot.
 *
 * Easy to get wrong: if somebody refreshes the original after its copy was
 * filled, the exchange would show readers what they have seen already.  A REFRESH
 * writes the view's row in pg_class, also if CONCURRENTLY; so under the locks of
 * the exchange these rows, and the definitions, are compared with what they were
 * when the copies were made, and if anything is different the locks are let go and
 * the copies made again.
 *
 * A copy cannot read what needs the primary key as it will be (GROUP BY the key,
 * and other columns selected), for there is none on the new column before the
 * exchange.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "definitions.h"
#include "dependents.h"
#include "executor/spi.h"
#include "leaves.h"
#include "matviews.h"
#include "state.h"
#include "steps.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"

/* how often copies are made again for what was refreshed meanwhile */
#define MAX_COPIES 10

static void
read_catalogs(const char *sql, const RmMigration *m, AttrNumber attnum, bool forward)
{
	Oid			types[] = {OIDOID, INT2OID, TEXTOID};
	Datum		v[] = {ObjectIdGetDatum(m->relid), Int16GetDatum(attnum),
	CStringGetTextDatum(rm_built_prefix(m, forward))};

	rm_catalog_query(sql, 3, types, v);
}

/* copies of what reads the column in force, those that others read first */
List *
rm_copies_wanted(const RmMigration *m, bool forward)
{
	List	   *list = NIL;

	read_catalogs("SELECT name, relation, copy_name, aside_sql, make_sql, wait_sql, fill_sql, take_sql, state"
				  " FROM risky_migrations.column_copies($1, $2, $3) ORDER BY ord",
				  m, forward ? m->attnum : m->new_attnum, forward);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		RmCopy	   *c = palloc(sizeof(RmCopy));

		c->name = rm_result_text(i, 1);
		c->relid = DatumGetObjectId(rm_result_datum(i, 2));
		c->copy_name = rm_result_text(i, 3);
		c->aside_sql = rm_result_text(i, 4);
		c->make_sql = rm_settings_list(rm_result_datum(i, 5));
		c->wait_sql = rm_settings_list(rm_result_datum(i, 6));
		c->fill_sql = rm_result_text(i, 7);
		c->take_sql = rm_settings_list(rm_result_datum(i, 8));
		c->state = rm_result_text(i, 9);
		list = lappend(list, c);
	}
	return list;
}

/* the copy of that one, or NULL */
const RmCopy *
rm_copy_of(List *copies, Oid relid)
{
	ListCell   *lc;

	foreach(lc, copies)
		if (((RmCopy *) lfirst(lc))->relid == relid)
			return lfirst(lc);
	return NULL;
}

/* OIDs of the copies that wait */
List *
rm_copies_there(const RmMigration *m, bool forward)
{
	List	   *relids = NIL;

	read_catalogs("SELECT relation FROM risky_migrations.copies_there($1, $3) WHERE $2 IS NOT NULL",
				  m, m->attnum, forward);
	for (uint64 i = 0; i < SPI_processed; i++)
		relids = lappend_oid(relids, DatumGetObjectId(rm_result_datum(i, 1)));
	return relids;
}

static void
execute_all(List *commands)
{
	ListCell   *lc;

	foreach(lc, commands)
		rm_execute(lfirst(lc));
}

/* makes empty copies under the names of the future; needs all locks */
static void
make_copies(const RmMigration *m, List *wanted, bool forward)
{
	ListCell   *lc;

	rm_swap_names(m, forward);
	foreach(lc, wanted)
		rm_execute(((RmCopy *) lfirst(lc))->aside_sql);
	foreach(lc, wanted)
		execute_all(((RmCopy *) lfirst(lc))->make_sql);
	foreach(lc, wanted)
		execute_all(((RmCopy *) lfirst(lc))->wait_sql);
	rm_swap_names(m, !forward);
}

/* what tells that these are still the same, not refreshed since */
static char *
state_of(List *wanted)
{
	StringInfoData buf;
	ListCell   *lc;

	initStringInfo(&buf);
	foreach(lc, wanted)
		appendStringInfo(&buf, "%s ", ((RmCopy *) lfirst(lc))->state);
	return buf.data;
}

/*
 * Locks what is needed to make copies; false if there are none to be made, nor old
 * ones to be dropped.
 */
bool
rm_copies_lock(RmRun *run, bool forward)
{
	RmMigration *m = run->m;
	List	   *old = rm_copies_there(m, forward);
	List	   *wanted = rm_copies_wanted(m, forward);
	List	   *relids = list_concat_unique_oid(rm_tree(m->relid), old);
	ListCell   *lc;

	if (wanted == NIL && old == NIL)
		return false;
	foreach(lc, wanted)
		relids = lappend_oid(relids, ((RmCopy *) lfirst(lc))->relid);
	rm_lock_relations(&run->locks, relids, AccessExclusiveLock, run->tries);
	/* one that was made before we had the locks: again */
	foreach(lc, rm_copies_wanted(m, forward))
		if (!list_member_oid(relids, ((RmCopy *) lfirst(lc))->relid))
			rm_refuse_just_changed(m);
	return true;
}

/*
 * Makes all copies anew; the locks are held.  55006 if that has been done too
 * often, because somebody refreshes the originals all the time.
 */
void
rm_copies_make(RmRun *run, RmCopies *copies, bool forward)
{
	RmMigration *m = run->m;

	if (copies->made++ >= MAX_COPIES)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("the materialized views on column \"%s\" of %s have changed %d times while they were filled again",
						m->column, m->relation, MAX_COPIES),
				 errdetail("Each REFRESH of one of them makes what was filled before it old."),
				 errhint("Let them be for a while, and call it again (next_call in rm_migrations).")));
	rm_check_owner(m->relid, m->relation);
	execute_all(rm_dependents_copies(m, forward));
	make_copies(m, rm_copies_wanted(m, forward), forward);
	copies->state = MemoryContextStrdup(run->cxt, state_of(rm_copies_wanted(m, forward)));
}

/* the first one that is to be filled and is not */
static const RmCopy *
find_unfilled(const RmMigration *m, bool forward)
{
	List	   *unpopulated = NIL;
	ListCell   *lc;

	read_catalogs("SELECT relation FROM risky_migrations.copies_there($1, $3) WHERE NOT populated AND $2 IS NOT NULL",
				  m, m->attnum, forward);
	for (uint64 i = 0; i < SPI_processed; i++)
		unpopulated = lappend_oid(unpopulated, DatumGetObjectId(rm_result_datum(i, 1)));
	foreach(lc, rm_copies_wanted(m, forward))
	{
		RmCopy	   *c = lfirst(lc);

		if (c->fill_sql &&
			list_member_oid(unpopulated, get_relname_relid(c->copy_name, get_rel_namespace(c->relid))))
			return c;
	}
	return NULL;
}

/*
 * Chooses the one that the next transaction fills; false if there is none.  Not
 * in that transaction itself: whoever reads definitions keeps a lock on what they
 * name until its end, for which a REFRESH of the original would wait.
 */
bool
rm_copies_choose(RmRun *run, RmCopies *copies, bool forward)
{
	const RmCopy *copy = find_unfilled(run->m, forward);
	MemoryContext oldcxt;

	if (copy == NULL)
		return false;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	copies->filling = pstrdup(copy->name);
	copies->fill_sql = pstrdup(copy->fill_sql);
	copies->analyze_sql =
		psprintf("ANALYZE %s", quote_qualified_identifier(get_namespace_name(get_rel_namespace(copy->relid)),
														   copy->copy_name));
	MemoryContextSwitchTo(oldcxt);
	run->wait_kind = "refresh";
	run->wait_reason = psprintf("REFRESH MATERIALIZED VIEW %s", copy->name);
	return true;
}

/*
 * Fills it, as its owner: REFRESH sees to that.  The search_path is the
 * session's, for functions that the query calls; until 17, which sets its own.
 */
void
rm_copies_fill(RmRun *run, RmCopies *copies)
{
	rm_check_owner(run->m->relid, run->m->relation);
	if (SPI_execute(copies->fill_sql, false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not refresh the copy of %s", copies->filling);
	rm_execute(copies->analyze_sql);
	copies->filling = NULL;
}

/* are the copies there, filled, and no older than the originals?  Needs the locks. */
bool
rm_copies_good(const RmMigration *m, const RmCopies *copies, bool forward)
{
	List	   *wanted = rm_copies_wanted(m, forward);
	ListCell   *lc;

	if (copies->state == NULL || strcmp(copies->state, state_of(wanted)) != 0 ||
		find_unfilled(m, forward) != NULL)
		return false;
	foreach(lc, wanted)
	{
		RmCopy	   *c = lfirst(lc);

		if (!OidIsValid(get_relname_relid(c->copy_name, get_rel_namespace(c->relid))))
			return false;
	}
	return true;
}

/* tries it, as soon as there is a new column; in a subtransaction that is undone */
void
rm_copies_rehearse(RmMigration *m, List *wanted)
{
	make_copies(m, wanted, true);
}
