/*-------------------------------------------------------------------------
 *
 * rewrite_transfer.c
 *	  online_rewrite: from a row of the table to one of the shadow.
 *
 * Whoever brings rows over (the copy, a round of replaying) or compares them
 * takes a number of them, has them made all at once, and does with the new rows
 * what it wants:
 *
 *	rm_transfer_add()		one more row of the table, where it lies in a buffer
 *	rm_transfer_make()		t->made[] are the new rows of t->rows[]
 *	rm_transfer_clear()
 *
 * To make a row is to evaluate the expressions, each on the old row, and to check the
 * result against the constraints on the columns that the changed table will have.  Any of that
 * may fail, so it is done in a subtransaction; and since most rows do not fail,
 * in one for all of them.  Only if that has failed, each row gets one of its own,
 * to find out which are at fault.  Those are recorded, and have no new row, or,
 * where the user accepts that, one with NULL.
 *
 * From rm_transfer_begin() on we are the table's owner, in a security-restricted
 * operation, with the settings of the migration.
 *
 * Easy to get wrong: the buffers are pinned for longer than the subtransaction.  So
 * rows are added outside of it.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "rewrite.h"
#include "rows.h"
#include "storage/bufmgr.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"

/*
 * Begins the work of one transaction on rel, which the caller has opened and
 * locked.  Takes a snapshot, and the lock on the shadow.
 */
RmTransfer *
rm_transfer_begin(RmMigration *m, RmRewrite *rw, Relation rel, LOCKMODE shadow_lock,
				  bool indexes)
{
	RmTransfer *t = palloc0(sizeof(RmTransfer));

	t->m = m;
	t->rw = rw;
	t->rel = rel;
	t->shadow = table_open(rw->shadow, shadow_lock);
	GetUserIdAndSecContext(&t->save_userid, &t->save_sec_context);
	SetUserIdAndSecContext(rel->rd_rel->relowner,
						   t->save_sec_context | SECURITY_RESTRICTED_OPERATION);
	PushActiveSnapshot(rw->snapshot ? rw->snapshot : GetTransactionSnapshot());
	t->snapshot = GetActiveSnapshot();
	rm_settings_apply(m->settings, GUC_ACTION_LOCAL);
	t->ncolumns = list_length(m->columns);
	t->columns = palloc(sizeof(RmTransferColumn) * Max(t->ncolumns, 1));
	for (int i = 0; i < t->ncolumns; i++)
	{
		RmTransferColumn *c = &t->columns[i];

		c->def = list_nth(m->columns, i);
		c->attnum = list_nth_int(rw->attnums, i);
		c->conv = rm_column_conversion(m, c->def, rel, CurrentMemoryContext);
		c->conv->settings_fixed = true;
	}
	t->new_slot = MakeSingleTupleTableSlot(RelationGetDescr(t->shadow), &TTSOpsVirtual);
	t->made_cxt = AllocSetContextCreate(CurrentMemoryContext, "rm new rows", ALLOCSET_DEFAULT_SIZES);
	t->row_cxt = AllocSetContextCreate(CurrentMemoryContext, "rm row", ALLOCSET_DEFAULT_SIZES);
	t->estate = CreateExecutorState();
	t->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(t->rri, t->shadow, 0, NULL, 0);
	if (indexes)
		ExecOpenIndices(t->rri, false);
	return t;
}

void
rm_transfer_end(RmTransfer *t)
{
	for (int i = 0; i < RM_TRANSFER_ROWS && t->rows[i]; i++)
		ExecDropSingleTupleTableSlot(t->rows[i]);
	ExecDropSingleTupleTableSlot(t->new_slot);
	if (t->rri->ri_NumIndices > 0)
		ExecCloseIndices(t->rri);
	FreeExecutorState(t->estate);
	for (int i = 0; i < t->ncolumns; i++)
		FreeExprContext(t->columns[i].conv->econtext, true);
	MemoryContextDelete(t->made_cxt);
	MemoryContextDelete(t->row_cxt);
	PopActiveSnapshot();
	SetUserIdAndSecContext(t->save_userid, t->save_sec_context);
	table_close(t->shadow, NoLock);
}

/* are those that there are to be made first?  We pin but a small part of shared_buffers */
bool
rm_transfer_is_full(const RmTransfer *t)
{
	return t->nrows == RM_TRANSFER_ROWS || t->npins >= Max(4, NBuffers / 64);
}

/* one more row of the table, in a pinned buffer, or with InvalidBuffer in made_cxt; false: is full */
bool
rm_transfer_add(RmTransfer *t, HeapTuple tup, Buffer buf)
{
	int			n = t->nrows;

	if (rm_transfer_is_full(t))
		return false;
	if (BufferIsValid(buf) && (t->npins == 0 || t->pins[t->npins - 1] != buf))
	{
		IncrBufferRefCount(buf);
		t->pins[t->npins++] = buf;
	}
	if (t->rows[n] == NULL)
		t->rows[n] = MakeSingleTupleTableSlot(RelationGetDescr(t->rel), &TTSOpsHeapTuple);
	t->tuples[n] = *tup;
	ExecStoreHeapTuple(&t->tuples[n], t->rows[n], false);
	t->nrows++;
	return true;
}

/* the same from the slot of a scan */
bool
rm_transfer_add_slot(RmTransfer *t, TupleTableSlot *slot)
{
	BufferHeapTupleTableSlot *b = (BufferHeapTupleTableSlot *) slot;

	Assert(TTS_IS_BUFFERTUPLE(slot));
	return rm_transfer_add(t, b->base.tuple, b->buffer);
}

void
rm_transfer_clear(RmTransfer *t)
{
	for (int i = 0; i < t->nrows; i++)
		ExecClearTuple(t->rows[i]);
	for (int i = 0; i < t->npins; i++)
		ReleaseBuffer(t->pins[i]);
	t->nrows = t->npins = 0;
	MemoryContextReset(t->made_cxt);
}

/*
 * What the row of the table becomes; no checks.  null_column: gets NULL, and is
 * not evaluated.
 */
static void
fill_new_slot(RmTransfer *t, TupleTableSlot *row, const RmTransferColumn *null_column)
{
	TupleDesc	desc = RelationGetDescr(t->rel);

	ExecClearTuple(t->new_slot);
	slot_getallattrs(row);
	memcpy(t->new_slot->tts_values, row->tts_values, sizeof(Datum) * desc->natts);
	memcpy(t->new_slot->tts_isnull, row->tts_isnull, sizeof(bool) * desc->natts);
	for (int i = 0; i < desc->natts; i++)
		if (TupleDescAttr(desc, i)->attisdropped)
			t->new_slot->tts_isnull[i] = true;
	/* each of the old row */
	for (int i = 0; i < t->ncolumns; i++)
	{
		const RmTransferColumn *c = t->column = &t->columns[i];

		if (c == null_column)
			t->new_slot->tts_isnull[c->attnum - 1] = true;
		else
			t->new_slot->tts_values[c->attnum - 1] =
				rm_conversion_evaluate(c->conv, row, &t->new_slot->tts_isnull[c->attnum - 1]);
	}
	t->column = NULL;
	ExecStoreVirtualTuple(t->new_slot);
}

/* the new row that stands in new_slot, in the context of those that are made */
static HeapTuple
form_new_row(RmTransfer *t)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(t->made_cxt);
	HeapTuple	tup = heap_form_tuple(RelationGetDescr(t->shadow), t->new_slot->tts_values,
									  t->new_slot->tts_isnull);

	MemoryContextSwitchTo(oldcxt);
	return tup;
}

/* errors are those of the expression and of the constraints */
static void
make_rows(RmTransfer *t, int from, int to)
{
	for (int i = from; i < to; i++)
	{
		fill_new_slot(t, t->rows[i], NULL);
		if (RelationGetDescr(t->shadow)->constr)
		{
			ExecConstraints(t->rri, t->new_slot, t->estate);
			ResetPerTupleExprContext(t->estate);
		}
		t->made[i] = form_new_row(t);
	}
}

/* the same in a subtransaction; the error if a row is at fault, else NULL */
static ErrorData *
try_rows(RmTransfer *t, int from, int to)
{
	MemoryContext oldcxt = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		MemoryContextSwitchTo(oldcxt);
		make_rows(t, from, to);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		error = rm_conversion_caught(t->made_cxt);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcxt);
	CurrentResourceOwner = oldowner;
	return error;
}

/* an error of the shadow's constraints, told without the shadow's name */
static void
name_constraint(ErrorData *error)
{
	if (error->table_name == NULL)
		return;					/* a domain's, for example */
	if (error->sqlerrcode == ERRCODE_CHECK_VIOLATION && error->constraint_name)
		error->message = psprintf("the new value violates check constraint \"%s\"",
								  error->constraint_name);
	else if (error->sqlerrcode == ERRCODE_NOT_NULL_VIOLATION)
		error->message = pstrdup("the expression gives NULL for this value");
}

/* records a row that could not be made; it may become one with NULL */
static void
settle(RmTransfer *t, int i, ErrorData *error)
{
	TupleTableSlot *row = t->rows[i];
	const RmTransferColumn *c = t->column ? t->column : &t->columns[0];
	bool		isnull;
	Datum		d = slot_getattr(row, c->attnum, &isnull);
	char	   *value = NULL;

	name_constraint(error);
	if (t->ncolumns > 1 && t->column)
		error->message = psprintf("column \"%s\": %s", c->def->column, error->message);
	t->column = NULL;
	if (!isnull)
	{
		Oid			out;
		bool		varlena;

		/* which it has now: an expression that does not read it is not concerned */
		getTypeOutputInfo(TupleDescAttr(RelationGetDescr(t->rel), c->attnum - 1)->atttypid, &out, &varlena);
		value = OidOutputFunctionCall(out, d);
	}
	rm_record_failure(t->m, rm_row_key(t->rel, row), &row->tts_tid, value, error);
	if (t->m->null_on_error &&
		!TupleDescAttr(RelationGetDescr(t->shadow), c->attnum - 1)->attnotnull)
	{
		fill_new_slot(t, row, c);
		t->made[i] = form_new_row(t);
	}
	else
	{
		t->made[i] = NULL;
		t->failed++;
	}
}

/* makes what all rows become */
void
rm_transfer_make(RmTransfer *t)
{
	if (t->nrows == 0 || try_rows(t, 0, t->nrows) == NULL)
		return;
	for (int i = 0; i < t->nrows; i++)
	{
		ErrorData  *error = try_rows(t, i, i + 1);

		if (error && t->ncolumns == 0)
			ReThrowError(error);	/* the row is what it was */
		if (error)
			settle(t, i, error);
	}
}
