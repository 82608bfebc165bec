/*-------------------------------------------------------------------------
 *
 * sync_trigger.c
 *	  The sync trigger: every write gives the shadow column its value, and
 *	  after the swap the old column.
 *
 * BEFORE INSERT OR UPDATE, for each row and all columns (a trigger before it
 * may have changed the source column), ENABLE ALWAYS (rows applied by
 * replication need it too), and the last of its kind by name.  Its argument
 * is the migration's id.
 *
 * What the migration says is read once per session and kept until the table's
 * catalogs change: each step that changes what the trigger has to do also
 * alters the table.  It is read with a snapshot of its own, not with the
 * writer's: a REPEATABLE READ writer may have begun before the migration.
 *
 * A value that does not convert must not fail the write: it is recorded, and
 * the shadow column is NULL.  Once the shadow column's own constraints exist
 * (enforced), the write fails as it would on the changed table.
 *
 * After the swap an INSERT without a list of columns gives to the old column,
 * whose position it still is, what was meant for the new one.  The trigger
 * would write over it, and the value would be lost without a word: so the new
 * column gets what the expression makes of it, and where it has a value already
 * the INSERT is refused.
 *
 * Easy to get wrong: a trigger can outlive what it belongs to (restored from
 * a dump into a database without the migration's row, a source column that
 * was dropped with CASCADE).  Then it leaves the row as it is.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "compat.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "leaves.h"
#include "migration.h"
#include "optimizer/optimizer.h"
#include "rows.h"
#include "state.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

PG_FUNCTION_INFO_V1(rm_sync);

/* the trigger of one migration on one table */
typedef struct SyncKey
{
	int64		id;
	int64		relid;			/* as wide as id: no padding in a hash key */
} SyncKey;

/* what it has to do; kept for the session */
typedef struct SyncEntry
{
	SyncKey		key;
	bool		valid;
	MemoryContext cxt;			/* of all below, NULL if there is nothing to do */
	RmMigration m;				/* only what the trigger needs */
	RmConversion *conv;			/* not prepared */
	RmConversion *forward;		/* from old to new, after the swap; likewise */
} SyncEntry;

/* the same for one statement */
typedef struct SyncState
{
	RmMigration m;
	RmConversion *conv;			/* NULL: leave rows as they are, unless ... */
	ErrorData  *error;			/* ... this happened: record it for each row */
	RmConversion *forward;		/* after the swap, where rows are inserted */
	TupleTableSlot *slot;
	MemoryContext value_cxt;
	Bitmapset  *reads;			/* columns that the conversion reads */
} SyncState;

static HTAB *sync_entries = NULL;

/* the table's catalogs have changed: read again what there is to do */
static void
relation_changed(Datum arg, Oid relid)
{
	HASH_SEQ_STATUS seq;
	SyncEntry  *entry;

	hash_seq_init(&seq, sync_entries);
	while ((entry = hash_seq_search(&seq)) != NULL)
		if (relid == InvalidOid || relid == entry->key.relid)
			entry->valid = false;
}

/* a function has changed: it may be one that was inlined */
static void
function_changed(Datum arg, int cacheid, uint32 hashvalue)
{
	relation_changed(arg, InvalidOid);
}

static void
make_cache(void)
{
	HASHCTL		ctl = {.keysize = sizeof(SyncKey),.entrysize = sizeof(SyncEntry)};

	if (sync_entries)
		return;
	sync_entries = hash_create("rm sync triggers", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	CacheRegisterRelcacheCallback(relation_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(PROCOID, function_changed, (Datum) 0);
}

static char *
text_attribute(HeapTuple tup, TupleDesc desc, const char *name)
{
	bool		isnull;
	Datum		d = heap_getattr(tup, SPI_fnumber(desc, name), desc, &isnull);

	return isnull ? NULL : TextDatumGetCString(d);
}

static Datum
attribute(HeapTuple tup, TupleDesc desc, const char *name)
{
	bool		isnull;

	return heap_getattr(tup, SPI_fnumber(desc, name), desc, &isnull);
}

/* the column that the trigger writes */
static AttrNumber
target_column(const RmMigration *m)
{
	return m->swapped ? m->attnum : m->new_attnum;
}

/* the conversion that is kept in the named columns; NULL if it or its target is gone */
static RmConversion *
load_conversion(SyncEntry *entry, Relation rel, HeapTuple tup, TupleDesc desc,
				AttrNumber target, const char *tree_name, const char *expr_name)
{
	char	   *tree = text_attribute(tup, desc, tree_name);
	Form_pg_attribute att;

	if (tree == NULL || target <= 0 || target > RelationGetDescr(rel)->natts ||
		entry->m.new_attnum > RelationGetDescr(rel)->natts)
		return NULL;
	att = TupleDescAttr(RelationGetDescr(rel), target - 1);
	if (att->attisdropped)
		return NULL;
	return rm_conversion_load(tree, DatumGetInt32(attribute(tup, desc, "server_version")),
							  text_attribute(tup, desc, expr_name),
							  entry->m.relid, rel, att->atttypid, att->atttypmod, target,
							  rm_settings_list(attribute(tup, desc, "settings")),
							  entry->cxt);
}

/* fills the entry from the migration's row; conv stays NULL if it has none */
static void
read_migration(SyncEntry *entry, Relation rel)
{
	Oid			state_relid = rm_state_relid("migration", true);
	Relation	state;
	SysScanDesc scan;
	ScanKeyData key;
	HeapTuple	tup;
	Snapshot	snapshot;

	if (!OidIsValid(state_relid))
		return;
	state = table_open(state_relid, AccessShareLock);
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	ScanKeyInit(&key, SPI_fnumber(RelationGetDescr(state), "id"),
				BTEqualStrategyNumber, F_INT8EQ, Int64GetDatum(entry->key.id));
	list_free(RelationGetIndexList(state));
	scan = systable_beginscan(state, state->rd_pkindex, OidIsValid(state->rd_pkindex),
							  snapshot, 1, &key);
	tup = systable_getnext(scan);
	if (HeapTupleIsValid(tup))
	{
		TupleDesc	desc = RelationGetDescr(state);
		MemoryContext oldcxt = MemoryContextSwitchTo(entry->cxt);
		RmMigration *m = &entry->m;

		m->id = entry->key.id;
		m->relid = DatumGetObjectId(attribute(tup, desc, "relid"));
		m->attnum = DatumGetInt16(attribute(tup, desc, "attnum"));
		m->new_attnum = DatumGetInt16(attribute(tup, desc, "new_attnum"));
		m->enforced = DatumGetBool(attribute(tup, desc, "enforced"));
		m->swapped = DatumGetBool(attribute(tup, desc, "swapped"));
		if (rm_is_leaf_of(rel, m->relid))
		{
			m->attnum = rm_leaf_attnum(m->relid, m->attnum, entry->key.relid);
			m->new_attnum = rm_leaf_attnum(m->relid, m->new_attnum, entry->key.relid);
			if (!m->swapped)
				entry->conv = load_conversion(entry, rel, tup, desc, m->new_attnum,
											  "conversion_tree", "using_expr");
			else
			{
				entry->conv = load_conversion(entry, rel, tup, desc, m->attnum,
											  "reverse_tree", "reverse_expr");
				entry->forward = load_conversion(entry, rel, tup, desc, m->new_attnum,
												 "conversion_tree", "using_expr");
			}
		}
		MemoryContextSwitchTo(oldcxt);
	}
	systable_endscan(scan);
	UnregisterSnapshot(snapshot);
	table_close(state, AccessShareLock);
}

/* the entry for the migration, read anew if need be */
static SyncEntry *
get_entry(int64 id, Relation rel)
{
	SyncKey		key = {.id = id,.relid = RelationGetRelid(rel)};
	SyncEntry  *entry;
	bool		found;

	make_cache();
	entry = hash_search(sync_entries, &key, HASH_ENTER, &found);
	if (!found)
	{
		entry->valid = false;
		entry->cxt = NULL;
	}
	if (entry->valid)
		return entry;

	if (entry->cxt)
		MemoryContextReset(entry->cxt);
	else
		entry->cxt = AllocSetContextCreate(CacheMemoryContext, "rm sync trigger",
										   ALLOCSET_SMALL_SIZES);
	memset(&entry->m, 0, sizeof(entry->m));
	entry->conv = entry->forward = NULL;
	/* an invalidation while we read must not be overlooked */
	entry->valid = true;
	PG_TRY();
	{
		read_migration(entry, rel);
	}
	PG_CATCH();
	{
		entry->valid = false;
		PG_RE_THROW();
	}
	PG_END_TRY();
	return entry;
}

/*
 * The conversion, copied (the entry may be thrown away while the statement
 * runs) and ready for use.
 */
static RmConversion *
prepare_conversion(const RmConversion *source, MemoryContext cxt)
{
	RmConversion *conv = palloc(sizeof(RmConversion));
	ListCell   *lc;

	*conv = *source;
	conv->expr = copyObject(source->expr);
	conv->settings = NIL;
	foreach(lc, source->settings)
		conv->settings = lappend(conv->settings, pstrdup(lfirst(lc)));
	conv->seen_valid = false;
	rm_conversion_prepare(conv, cxt);
	return conv;
}

/* are values that do not convert to be refused? */
static bool
must_convert(const RmMigration *m)
{
	return m->enforced && !m->swapped;
}

/*
 * What is needed for the rows of one statement.  An error of it (the owner may
 * not call a function any more) must not fail the write either: it is kept,
 * and recorded for each row.
 */
static SyncState *
begin_statement(TriggerData *trigdata, FmgrInfo *flinfo)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(flinfo->fn_mcxt);
	ResourceOwner oldowner = CurrentResourceOwner;
	SyncState  *state = palloc0(sizeof(SyncState));
	Trigger    *trigger = trigdata->tg_trigger;
	int64		id;

	if (trigger->tgnargs != 1)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("%s.sync() takes one argument, the migration's id", RM_SCHEMA),
				 errdetail("The trigger \"%s\" gives it %d.", trigger->tgname, trigger->tgnargs),
				 errhint("Such triggers are made by rm_add_column() only.")));
	id = pg_strtoint64(trigger->tgargs[0]);

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(flinfo->fn_mcxt);
	PG_TRY();
	{
		SyncEntry  *entry = get_entry(id, trigdata->tg_relation);

		state->m = entry->m;
		state->m.new_type = NULL;
		if (entry->conv)
		{
			state->conv = prepare_conversion(entry->conv, flinfo->fn_mcxt);
			pull_varattnos((Node *) state->conv->expr, 1, &state->reads);
		}
		/* one statement may both insert and update: ON CONFLICT, MERGE */
		if (entry->forward)
			state->forward = prepare_conversion(entry->forward, flinfo->fn_mcxt);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		SyncKey		key = {.id = id,.relid = RelationGetRelid(trigdata->tg_relation)};
		SyncEntry  *entry = hash_search(sync_entries, &key, HASH_FIND, NULL);

		MemoryContextSwitchTo(flinfo->fn_mcxt);
		state->error = rm_conversion_caught(flinfo->fn_mcxt);
		if (entry)
			state->m = entry->m;
		if (state->m.new_attnum <= 0 || must_convert(&state->m))
			ReThrowError(state->error);
		state->conv = state->forward = NULL;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(flinfo->fn_mcxt);
	CurrentResourceOwner = oldowner;

	if (state->conv || state->error || state->forward)
	{
		state->slot = MakeSingleTupleTableSlot(CreateTupleDescCopyConstr(RelationGetDescr(trigdata->tg_relation)),
											   &TTSOpsHeapTuple);
		state->value_cxt = AllocSetContextCreate(flinfo->fn_mcxt, "rm sync value",
												 ALLOCSET_SMALL_SIZES);
	}
	flinfo->fn_extra = state;
	MemoryContextSwitchTo(oldcxt);
	return state;
}

/* has an UPDATE changed that column? */
static bool
column_changed(TriggerData *trigdata, AttrNumber attnum)
{
	TupleDesc	desc = RelationGetDescr(trigdata->tg_relation);
	Form_pg_attribute att = TupleDescAttr(desc, attnum - 1);
	Datum		before;
	Datum		after;
	bool		before_isnull;
	bool		after_isnull;

	before = heap_getattr(trigdata->tg_trigtuple, attnum, desc, &before_isnull);
	after = heap_getattr(trigdata->tg_newtuple, attnum, desc, &after_isnull);
	return before_isnull != after_isnull ||
		(!before_isnull && !datum_image_eq(before, after, att->attbyval, att->attlen));
}

/*
 * After the swap the old column is only kept for the way back: it is left as
 * it is where nothing changes that its value is made of, so that what was there
 * before comes back to the letter.
 */
static bool
nothing_to_do(SyncState *state, TriggerData *trigdata)
{
	int			i = -1;

	if (!state->m.swapped || !TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event))
		return false;
	if (column_changed(trigdata, state->m.new_attnum))
		return false;
	while ((i = bms_next_member(state->reads, i)) >= 0)
		if (column_changed(trigdata, i + FirstLowInvalidHeapAttributeNumber))
			return false;
	return true;
}

/*
 * After the swap an INSERT without a list of columns gives the old column, whose
 * position it still is, what is meant for the new one.  Where the new one has no
 * value, it gets the one that the expression makes of it, as it would have in
 * the changed table, with its errors.  NULL if there is nothing to do.
 */
static HeapTuple
take_value_aside(SyncState *state, HeapTuple tuple, TupleDesc desc)
{
	int			column = state->m.new_attnum;
	Datum		value;
	bool		isnull;

	(void) slot_getattr(state->slot, state->m.attnum, &isnull);
	if (isnull)
		return NULL;
	(void) slot_getattr(state->slot, column, &isnull);
	if (!isnull)
		return NULL;
	value = rm_conversion_evaluate(state->forward, state->slot, &isnull);
	return heap_modify_tuple_by_cols(tuple, desc, 1, &column, &value, &isnull);
}

/*
 * Refuses (428C9) the row of an INSERT that gives the old column a value, other
 * than one that belongs to the value of the new column (its default, say).
 */
static void
refuse_value_aside(SyncState *state, Relation rel)
{
	RmConversion *forward = state->forward;
	Datum		value;
	Datum		new_value;
	bool		isnull;
	bool		new_isnull;
	ErrorData  *error;

	new_value = slot_getattr(state->slot, state->m.new_attnum, &new_isnull);
	if (rm_conversion_try(forward, state->slot, state->value_cxt, &value, &isnull, &error) &&
		isnull == new_isnull &&
		(isnull || datum_image_eq(value, new_value, forward->typbyval, forward->typlen)))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_GENERATED_ALWAYS),
			 errmsg("the value for column \"%s\" of relation \"%s\" would be lost",
					NameStr(TupleDescAttr(RelationGetDescr(rel), state->m.attnum - 1)->attname),
					RelationGetRelationName(rel)),
			 errdetail("Migration %lld has put another column in its place, \"%s\". INSERT and COPY without a list of columns go by position, and still give the old one its value.",
					   (long long) state->m.id,
					   NameStr(TupleDescAttr(RelationGetDescr(rel), state->m.new_attnum - 1)->attname)),
			 errhint("Name the columns in the INSERT or COPY. Until that is done CALL rm_rollback(%lld) goes back.",
					 (long long) state->m.id)));
}

/* writes the failure down in the writer's transaction */
static void
record_failure(SyncState *state, Relation rel, ErrorData *error)
{
	bool		isnull;
	AttrNumber	source = state->m.swapped ? state->m.new_attnum : state->m.attnum;
	Datum		d = slot_getattr(state->slot, source, &isnull);
	char	   *value = NULL;

	if (!isnull)
	{
		Oid			out;
		bool		varlena;

		getTypeOutputInfo(TupleDescAttr(RelationGetDescr(rel), source - 1)->atttypid,
						  &out, &varlena);
		value = OidOutputFunctionCall(out, d);
	}
	SPI_connect();
	rm_record_failure(&state->m, rm_row_key(rel, state->slot), NULL, value, error);
	SPI_finish();
}

/*
 * rm_sync() returns trigger
 *
 * Gives NEW's shadow column the value that the migration's expression has for
 * NEW; after the swap the old column that of the expression for the way back.
 * Errors: 39P01 if it is not called as such a trigger; those of the conversion
 * once the new column's constraints are in force; 428C9 for an INSERT after the
 * swap that gives the old column a value.
 */
Datum
rm_sync(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	SyncState  *state;
	Relation	rel;
	HeapTuple	tuple;
	Datum		value = (Datum) 0;
	Datum		present;
	bool		isnull = true;
	bool		present_isnull;
	ErrorData  *error;
	Form_pg_attribute att;
	int			column;
	bool		inserts;

	if (!CALLED_AS_TRIGGER(fcinfo) ||
		!TRIGGER_FIRED_BEFORE(trigdata->tg_event) ||
		!TRIGGER_FIRED_FOR_ROW(trigdata->tg_event) ||
		TRIGGER_FIRED_BY_DELETE(trigdata->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("%s.sync() is the function of a trigger BEFORE INSERT OR UPDATE FOR EACH ROW",
						RM_SCHEMA),
				 errdetail("It was called in another way."),
				 errhint("Such triggers are made by rm_add_column() only.")));

	rel = trigdata->tg_relation;
	tuple = TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event) ?
		trigdata->tg_newtuple : trigdata->tg_trigtuple;
	state = fcinfo->flinfo->fn_extra;
	if (state == NULL)
		state = begin_statement(trigdata, fcinfo->flinfo);
	if (state->slot == NULL || nothing_to_do(state, trigdata))
		return PointerGetDatum(tuple);

	inserts = state->forward && TRIGGER_FIRED_BY_INSERT(trigdata->tg_event);
	MemoryContextReset(state->value_cxt);
	ExecStoreHeapTuple(tuple, state->slot, false);
	if (inserts)
	{
		HeapTuple	taken = take_value_aside(state, tuple, RelationGetDescr(rel));

		if (taken)
		{
			ExecClearTuple(state->slot);
			return PointerGetDatum(taken);
		}
	}
	if (state->error)
		record_failure(state, rel, state->error);
	else if (state->conv == NULL)
		 /* no way back */ ;
	else if (must_convert(&state->m))
		value = rm_conversion_evaluate(state->conv, state->slot, &isnull);
	else if (!rm_conversion_try(state->conv, state->slot, state->value_cxt, &value,
								&isnull, &error))
	{
		record_failure(state, rel, error);
		value = (Datum) 0;
		isnull = true;
	}

	column = target_column(&state->m);
	att = TupleDescAttr(RelationGetDescr(rel), column - 1);
	present = slot_getattr(state->slot, column, &present_isnull);
	if (isnull != present_isnull ||
		(!isnull && !datum_image_eq(value, present, att->attbyval, att->attlen)))
	{
		if (inserts && !present_isnull)
			refuse_value_aside(state, rel);
		if (state->conv || state->error)
			tuple = heap_modify_tuple_by_cols(tuple, RelationGetDescr(rel), 1, &column,
											  &value, &isnull);
	}
	ExecClearTuple(state->slot);
	return PointerGetDatum(tuple);
}
