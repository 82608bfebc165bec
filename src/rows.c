/*-------------------------------------------------------------------------
 *
 * rows.c
 *	  Rows of a table, page by page, and a new value for one of them.
 *
 * The backfill and the verification read a table in the order of its pages:
 * no index or key is needed, and the cost of a batch does not grow with the
 * table.  A new value is stored as logical replication stores a row, with
 * table_tuple_update() and ExecInsertIndexTuples(): none of the user's
 * triggers or rules fire, row security does not filter, no other column
 * changes, and, above all, a row that is locked by somebody else is reported
 * as such at once instead of being waited for.
 *
 * A page is pinned while its rows are worked on, so no row version on it can
 * be moved, but it is not locked: the conversion may be the user's code.
 *
 * Easy to get wrong: a row version that is visible may have a successor by
 * the time it is updated.  That successor was written with the sync trigger
 * in place, so TM_Updated and TM_Deleted mean that nothing is left to do.
 *
 * From rm_rows_open() to rm_rows_close() we are the table's owner, in a
 * security-restricted operation: the expression and those of indexes may be the
 * owner's code, and even planning them evaluates what is constant in them.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/tableam.h"
#include "access/visibilitymap.h"
#include "access/xact.h"
#include "catalog/index.h"
#include "catalog/pg_inherits.h"
#include "compat.h"
#include "executor/executor.h"
#include "leaves.h"
#include "miscadmin.h"
#include "pages.h"
#include "rows.h"
#include "storage/bufmgr.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* longest wait for a row while others are locked, in milliseconds */
#define ROW_LOCK_TIMEOUT "20"

/*
 * Begins work on the rows of rel, which the caller has opened and locked.
 * Takes a snapshot; call rm_rows_close() before the transaction ends (an error
 * needs no call).  To wait for rows, one may be changed in the transaction;
 * else waits are cut short.
 */
RmRows *
rm_rows_open(RmMigration *m, Relation rel, RmRowsMode mode)
{
	RmRows	   *rows = palloc0(sizeof(RmRows));
	int			natts = RelationGetDescr(rel)->natts;

	m = rm_migration_on(m, rel);
	/* whatever of the owner's runs from here on runs as the owner */
	GetUserIdAndSecContext(&rows->save_userid, &rows->save_sec_context);
	SetUserIdAndSecContext(rel->rd_rel->relowner,
						   rows->save_sec_context | SECURITY_RESTRICTED_OPERATION);
	rows->m = m;
	rows->rel = rel;
	rows->target = m->swapped ? m->attnum : m->new_attnum;
	if (mode == RM_ROWS_MANY)
		(void) set_config_option("lock_timeout", ROW_LOCK_TIMEOUT, PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
	rows->snapshot = GetTransactionSnapshot();
	PushActiveSnapshot(rows->snapshot);
	rows->snapshot = GetActiveSnapshot();

	/* in force until the end of the transaction: no look at each row */
	rm_settings_apply(m->settings, GUC_ACTION_LOCAL);
	rows->conv = rm_migration_conversion(m, rel, CurrentMemoryContext);
	rows->conv->settings_fixed = true;

	rows->slot = MakeSingleTupleTableSlot(RelationGetDescr(rel),
										  &TTSOpsBufferHeapTuple);
	rows->new_slot = MakeSingleTupleTableSlot(RelationGetDescr(rel),
											  &TTSOpsHeapTuple);
	rows->values = palloc(sizeof(Datum) * natts);
	rows->nulls = palloc(sizeof(bool) * natts);
	rows->row_cxt = AllocSetContextCreate(CurrentMemoryContext, "rm row",
										  ALLOCSET_DEFAULT_SIZES);
	if (mode != RM_ROWS_READ)
	{
		CheckCmdReplicaIdentity(rel, CMD_UPDATE);
		rows->estate = CreateExecutorState();
		rows->rri = makeNode(ResultRelInfo);
		/* not in any range table: no column counts as changed for the indexes */
		InitResultRelInfo(rows->rri, rel, 0, NULL, 0);
		ExecOpenIndices(rows->rri, false);
		rows->cid = GetCurrentCommandId(true);
	}
	return rows;
}

void
rm_rows_close(RmRows *rows)
{
	ExecDropSingleTupleTableSlot(rows->slot);
	ExecDropSingleTupleTableSlot(rows->new_slot);
	if (rows->rri)
	{
		ExecCloseIndices(rows->rri);
		FreeExecutorState(rows->estate);
	}
	FreeExprContext(rows->conv->econtext, true);
	PopActiveSnapshot();
	SetUserIdAndSecContext(rows->save_userid, rows->save_sec_context);
}

/*
 * Offsets of the rows on a pinned page that the snapshot sees; with
 * missing_only just those whose target is NULL.  *dead is the number of such
 * row versions that nobody new sees but that still take up room.
 */
int
rm_rows_on_page(RmRows *rows, Buffer buf, bool missing_only,
				OffsetNumber *offsets, int *dead)
{
	Page		page;
	BlockNumber block = BufferGetBlockNumber(buf);
	TupleDesc	desc = RelationGetDescr(rows->rel);
	OffsetNumber max;
	int			n = 0;

	*dead = 0;
	LockBuffer(buf, BUFFER_LOCK_SHARE);
	page = BufferGetPage(buf);
	max = PageGetMaxOffsetNumber(page);
	for (OffsetNumber off = FirstOffsetNumber; off <= max; off = OffsetNumberNext(off))
	{
		HeapTupleData tup;

		if (!ItemIdIsNormal(PageGetItemId(page, off)))
			continue;
		rm_tuple_on_page(rows->rel, page, block, off, &tup);
		/* the cheaper question first */
		if (missing_only && !heap_attisnull(&tup, rows->target, desc))
			continue;
		if (HeapTupleSatisfiesVisibility(&tup, rows->snapshot, buf))
			offsets[n++] = off;
		else if (!(tup.t_data->t_infomask & HEAP_XMAX_INVALID))
			(*dead)++;
	}
	LockBuffer(buf, BUFFER_LOCK_UNLOCK);
	return n;
}

/* puts a row of a pinned page, as found by rm_rows_on_page(), into the slot */
void
rm_row_get(RmRows *rows, Buffer buf, OffsetNumber offset)
{
	BufferHeapTupleTableSlot *bslot = (BufferHeapTupleTableSlot *) rows->slot;

	MemoryContextReset(rows->row_cxt);
	rows->block = BufferGetBlockNumber(buf);
	rm_tuple_on_page(rows->rel, BufferGetPage(buf), rows->block, offset, &bslot->base.tupdata);
	ExecStoreBufferHeapTuple(&bslot->base.tupdata, rows->slot, buf);
}

/* the same by TID; false if that version is not visible (any more) */
bool
rm_row_get_tid(RmRows *rows, ItemPointer tid)
{
	MemoryContextReset(rows->row_cxt);
	rows->block = ItemPointerGetBlockNumber(tid);
	if (rows->block >= RelationGetNumberOfBlocks(rows->rel))
		return false;
	return table_tuple_fetch_row_version(rows->rel, tid, rows->snapshot, rows->slot);
}

/* what the target column holds now */
Datum
rm_row_target(RmRows *rows, bool *isnull)
{
	return slot_getattr(rows->slot, rows->target, isnull);
}

/*
 * The new value for the row in the slot.  Carefully: in a subtransaction,
 * false and the error if the value is at fault.  Otherwise an error is raised
 * (and the whole transaction can be repeated carefully).
 */
bool
rm_row_convert(RmRows *rows, bool careful, Datum *value, bool *isnull,
			   ErrorData **error)
{
	if (careful)
		return rm_conversion_try(rows->conv, rows->slot, rows->row_cxt, value,
								 isnull, error);
	*value = rm_conversion_evaluate(rows->conv, rows->slot, isnull);
	return true;
}

/*
 * Forms the new version of the row in the slot; returns the room it needs on
 * a page.  Values of dropped columns are not carried along.
 */
Size
rm_row_make(RmRows *rows, Datum value, bool isnull)
{
	TupleDesc	desc = RelationGetDescr(rows->rel);
	MemoryContext oldcxt;
	HeapTuple	tup;

	slot_getallattrs(rows->slot);
	memcpy(rows->values, rows->slot->tts_values, sizeof(Datum) * desc->natts);
	memcpy(rows->nulls, rows->slot->tts_isnull, sizeof(bool) * desc->natts);
	for (int i = 0; i < desc->natts; i++)
		if (TupleDescAttr(desc, i)->attisdropped)
			rows->nulls[i] = true;
	rows->values[rows->target - 1] = value;
	rows->nulls[rows->target - 1] = isnull;

	oldcxt = MemoryContextSwitchTo(rows->row_cxt);
	tup = heap_form_tuple(desc, rows->values, rows->nulls);
	MemoryContextSwitchTo(oldcxt);
	tup->t_tableOid = RelationGetRelid(rows->rel);
	ExecStoreHeapTuple(tup, rows->new_slot, false);
	return MAXALIGN(tup->t_len) + sizeof(ItemIdData);
}

/*
 * Could the row in the slot be updated without waiting?  A single lock FOR KEY
 * SHARE, as a foreign key takes it, is in nobody's way.
 */
static TM_Result
try_row(RmRows *rows)
{
	BufferHeapTupleTableSlot *bslot = (BufferHeapTupleTableSlot *) rows->slot;
	HeapTuple	tup = bslot->base.tuple;
	uint16		infomask;
	TM_Result	result;

	LockBuffer(bslot->buffer, BUFFER_LOCK_SHARE);
	result = HeapTupleSatisfiesUpdate(tup, rows->cid, bslot->buffer);
	infomask = tup->t_data->t_infomask;
	LockBuffer(bslot->buffer, BUFFER_LOCK_UNLOCK);
	if (result == TM_BeingModified && !(infomask & HEAP_XMAX_IS_MULTI) &&
		HEAP_XMAX_IS_LOCKED_ONLY(infomask) && HEAP_XMAX_IS_KEYSHR_LOCKED(infomask))
		result = TM_Ok;
	return result;
}

/*
 * Stores the version that rm_row_make() has formed.  TM_BeingModified means
 * that somebody else has a lock on the row (only without wait); TM_Updated and
 * TM_Deleted that there is nothing left to do.
 *
 * heap_update() knows no way not to wait, so that is found out beforehand.
 * Somebody may lock the row in between; then it waits after all, but for no
 * longer than ROW_LOCK_TIMEOUT (55P03, and the transaction is repeated).
 */
TM_Result
rm_row_store(RmRows *rows, bool wait, bool *hot)
{
	TM_FailureData tmfd;
	LockTupleMode lockmode;
	RmUpdateIndexes update_indexes;
	TM_Result	result;
	ItemPointerData old_tid = rows->slot->tts_tid;

	if (!wait)
	{
		result = try_row(rows);
		if (result != TM_Ok)
			return result;
	}
	result = table_tuple_update(rows->rel, &old_tid, rows->new_slot, rows->cid,
								rows->snapshot, InvalidSnapshot, true, &tmfd,
								&lockmode, &update_indexes);
	if (result != TM_Ok)
		return result;
	*hot = rm_update_was_hot(update_indexes);
	if (rm_update_needs_indexes(update_indexes) && rows->rri->ri_NumIndices > 0)
	{
		rm_insert_index_tuples(rows->rri, rows->new_slot, rows->estate,
							   update_indexes);
		ResetPerTupleExprContext(rows->estate);
	}
	return result;
}

/* a column's value as text, in current memory */
static char *
column_text(Relation rel, TupleTableSlot *slot, AttrNumber attnum)
{
	Oid			out;
	bool		varlena;
	bool		isnull;
	Datum		d = slot_getattr(slot, attnum, &isnull);

	if (isnull)
		return NULL;
	getTypeOutputInfo(TupleDescAttr(RelationGetDescr(rel), attnum - 1)->atttypid,
					  &out, &varlena);
	return OidOutputFunctionCall(out, d);
}

/*
 * The row's primary key as "(id)=(17)", or its place if it has none; of a
 * partition with that one's name.  Of a table that inherits from another one the key
 * has the name too: the same key may be in both.
 */
char *
rm_row_key(Relation rel, TupleTableSlot *slot)
{
	StringInfoData names;
	StringInfoData values;
	Relation	pk;
	const char *table = "";

	list_free(RelationGetIndexList(rel));
	if (has_superclass(RelationGetRelid(rel)) &&
		!(rel->rd_rel->relispartition && OidIsValid(rel->rd_pkindex)))
		table = psprintf("%s ", rm_relation_sql(RelationGetRelid(rel)));
	if (!OidIsValid(rel->rd_pkindex))
		return psprintf("%sctid=(%u,%u)", table,
						ItemPointerGetBlockNumberNoCheck(&slot->tts_tid),
						ItemPointerGetOffsetNumberNoCheck(&slot->tts_tid));
	initStringInfo(&names);
	initStringInfo(&values);
	pk = index_open(rel->rd_pkindex, AccessShareLock);
	for (int i = 0; i < pk->rd_index->indnkeyatts; i++)
	{
		AttrNumber	attnum = pk->rd_index->indkey.values[i];
		char	   *value = column_text(rel, slot, attnum);

		appendStringInfo(&names, "%s%s", i ? ", " : "",
						 NameStr(TupleDescAttr(RelationGetDescr(rel), attnum - 1)->attname));
		appendStringInfo(&values, "%s%s", i ? ", " : "", value ? value : "null");
	}
	index_close(pk, AccessShareLock);
	return psprintf("%s(%s)=(%s)", table, names.data, values.data);
}

/* the column that is converted, as text; NULL if it is */
char *
rm_row_value(RmRows *rows)
{
	return column_text(rows->rel, rows->slot,
					   rows->m->swapped ? rows->m->new_attnum : rows->m->attnum);
}

/* records that the row in the slot does not convert */
void
rm_row_record_failure(RmRows *rows, ErrorData *error)
{
	rm_record_failure(rows->m, rm_row_key(rows->rel, rows->slot),
					  &rows->slot->tts_tid, rm_row_value(rows), error);
}
