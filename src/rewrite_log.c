/*-------------------------------------------------------------------------
 *
 * rewrite_log.c
 *	  online_rewrite: the change log, and the trigger that writes it.
 *
 * From the moment at which a migration begins, every change of the table leaves
 * the keys of the rows concerned in its change log, risky_migrations.log_<id>_<OID
 * of the table>; of a partitioned one each partition has a log of its own.  Of an
 * UPDATE it is the old key and, if it is another one, the new.  Nothing else
 * is kept: what the row looks like is read from the table, later, with one
 * snapshot for log and table.  So the log needs no order, and a transaction that
 * is rolled back leaves nothing in either.
 *
 * The writer is an AFTER trigger for each row, ENABLE ALWAYS; TRUNCATE gives the
 * table other storage, which is seen by that.  AFTER, because only then is it
 * known what the row has become.  It stores its row below the executor, as TOAST
 * and the catalogs do: whoever may write the table needs no right on the log, and
 * no policy or publication of the user's gets in between.
 *
 * A column of the log is called k<number of the table's column>; by these names
 * the trigger knows the key, and needs no state of the migration.
 *
 * Easy to get wrong:
 *
 *	Logical decoding must not send the log (nor the shadow) to subscribers that
 *	do not have it, also where a publication is FOR ALL TABLES.  Both tables have
 *	pg_class.relrewrite set, as the transient tables of ALTER TABLE do, and are
 *	passed over by every output plugin that does not ask for such tables.
 *
 *	The same field says whose log it is: a trigger that somebody else has made
 *	with our function, or that was restored from a dump, finds no log of its
 *	table's and does nothing.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "compat.h"
#include "executor/executor.h"
#include "fmgr.h"
#include "rewrite.h"
#include "state.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(rm_log_change);

static char *
log_name(int64 id, Oid relid)
{
	return psprintf("log_%lld_%u", (long long) id, relid);
}

/* number of the table's column that a column of the log is a copy of */
static AttrNumber
key_attnum(TupleDesc log_desc, int i)
{
	return (AttrNumber) pg_strtoint32(NameStr(TupleDescAttr(log_desc, i)->attname) + 1);
}

/*
 * Makes the change log for migration id of rel, whose rows are told apart by the
 * columns of key_index.
 */
Oid
rm_log_create(int64 id, Relation rel, Relation key_index)
{
	int			nkeys = IndexRelationGetNumberOfKeyAttributes(key_index);
	TupleDesc	desc = CreateTemplateTupleDesc(nkeys);

	for (int i = 0; i < nkeys; i++)
	{
		AttrNumber	attnum = key_index->rd_index->indkey.values[i];
		Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel), attnum - 1);

		TupleDescInitEntry(desc, i + 1, psprintf("k%d", attnum), att->atttypid,
						   att->atttypmod, 0);
		TupleDescInitEntryCollation(desc, i + 1, att->attcollation);
	}
	return rm_rewrite_create_table(log_name(id, RelationGetRelid(rel)), rel, InvalidOid, desc,
								   (Datum) 0);
}

/* stores the key of a row of the table */
void
rm_log_key(Relation log, TupleTableSlot *slot)
{
	TupleDesc	desc = RelationGetDescr(log);
	Datum		values[INDEX_MAX_KEYS];
	bool		nulls[INDEX_MAX_KEYS];
	HeapTuple	tup;

	for (int i = 0; i < desc->natts; i++)
		values[i] = slot_getattr(slot, key_attnum(desc, i), &nulls[i]);
	tup = heap_form_tuple(desc, values, nulls);
	simple_heap_insert(log, tup);
	heap_freetuple(tup);
}

/* rows of the log that the snapshot sees; counts no further than limit */
int64
rm_log_count(Relation log, Snapshot snapshot, int64 limit)
{
	TableScanDesc scan = table_beginscan(log, snapshot, 0, NULL);
	TupleTableSlot *slot = table_slot_create(log, NULL);
	int64		n = 0;

	while (n < limit && table_scan_getnextslot(scan, ForwardScanDirection, slot))
		n++;
	ExecDropSingleTupleTableSlot(slot);
	table_endscan(scan);
	return n;
}

/*-------------------------------------------------------------------------
 * The trigger
 *-------------------------------------------------------------------------
 */

/* the log of the trigger's migration; kept for one statement */
typedef struct LogState
{
	Oid			log;			/* InvalidOid: there is none */
	TupleTableSlot *slot;
	TupleTableSlot *new_slot;
} LogState;

static LogState *
begin_statement(TriggerData *trigdata, FmgrInfo *flinfo)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(flinfo->fn_mcxt);
	LogState   *state = palloc0(sizeof(LogState));
	Trigger    *trigger = trigdata->tg_trigger;
	Oid			nspid = get_namespace_oid(RM_SCHEMA, true);
	TupleDesc	desc;

	if (trigger->tgnargs != 1)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("%s.log_change() takes one argument, the migration's id", RM_SCHEMA),
				 errdetail("The trigger \"%s\" gives it %d.", trigger->tgname, trigger->tgnargs),
				 errhint("Such triggers are made by rm_alter_type() and rm_start() only.")));
	if (OidIsValid(nspid))
		state->log = get_relname_relid(log_name(pg_strtoint64(trigger->tgargs[0]),
												RelationGetRelid(trigdata->tg_relation)), nspid);
	desc = CreateTupleDescCopyConstr(RelationGetDescr(trigdata->tg_relation));
	state->slot = MakeSingleTupleTableSlot(desc, &TTSOpsHeapTuple);
	state->new_slot = MakeSingleTupleTableSlot(desc, &TTSOpsHeapTuple);
	flinfo->fn_extra = state;
	MemoryContextSwitchTo(oldcxt);
	return state;
}

/* are the keys of the two rows the same, to the letter? */
static bool
same_key(Relation log, TupleTableSlot *a, TupleTableSlot *b)
{
	TupleDesc	desc = RelationGetDescr(log);

	for (int i = 0; i < desc->natts; i++)
	{
		AttrNumber	attnum = key_attnum(desc, i);
		Form_pg_attribute att = TupleDescAttr(desc, i);
		bool		a_isnull;
		bool		b_isnull;
		Datum		x = slot_getattr(a, attnum, &a_isnull);
		Datum		y = slot_getattr(b, attnum, &b_isnull);

		if (a_isnull != b_isnull ||
			(!a_isnull && !datum_image_eq(x, y, att->attbyval, att->attlen)))
			return false;
	}
	return true;
}

static void
log_row(LogState *state, Relation log, TriggerData *trigdata)
{
	ExecStoreHeapTuple(trigdata->tg_trigtuple, state->slot, false);
	rm_log_key(log, state->slot);
	if (TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event))
	{
		ExecStoreHeapTuple(trigdata->tg_newtuple, state->new_slot, false);
		if (!same_key(log, state->slot, state->new_slot))
			rm_log_key(log, state->new_slot);
		ExecClearTuple(state->new_slot);
	}
	ExecClearTuple(state->slot);
}

/*
 * rm_log_change() returns trigger
 *
 * Writes the keys of the row's old and new version into the change log of the
 * migration.  Errors: 39P01 if it is not called as such a trigger.
 */
Datum
rm_log_change(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	LogState   *state;
	Relation	log;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_FOR_ROW(trigdata->tg_event) ||
		!TRIGGER_FIRED_AFTER(trigdata->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("%s.log_change() is the function of a trigger AFTER INSERT OR UPDATE OR DELETE FOR EACH ROW",
						RM_SCHEMA),
				 errdetail("It was called in another way."),
				 errhint("Such triggers are made by rm_alter_type() and rm_start() only.")));
	state = fcinfo->flinfo->fn_extra;
	if (state == NULL)
		state = begin_statement(trigdata, fcinfo->flinfo);
	if (!OidIsValid(state->log))
		return PointerGetDatum(NULL);

	/* the lock stays, as that of any table that is written */
	log = try_table_open(state->log, RowExclusiveLock);
	if (log == NULL)
		return PointerGetDatum(NULL);
	if (log->rd_rel->relrewrite == RelationGetRelid(trigdata->tg_relation))
		log_row(state, log, trigdata);
	table_close(log, NoLock);
	return PointerGetDatum(NULL);
}
