/*-------------------------------------------------------------------------
 *
 * rewrite_replay.c
 *	  online_rewrite: the step "catch_up", and one round of it.
 *
 * A round takes one snapshot and reads with it both the change log and the
 * table.  All rows whose keys are in the log are deleted from the shadow, then
 * those of them that the table has are made anew and stored, then just the log
 * rows that were read are removed.  After it the shadow is what the table was at
 * the snapshot:
 *
 *	whose key is in the log has been replaced by what the snapshot sees;
 *	whose key is not has not changed since the last round, or since it was copied:
 *	a transaction that the snapshot sees has left its keys in the log, and one
 *	that it does not see has left neither.
 *
 * All deletions come before all insertions, and the whole of the log is taken:
 * two rows may have exchanged a value that is unique, and row by row, or with a
 * part of the log, one would stand in the way of the other.
 *
 * The keys are sorted first: each is looked up once however often its row was
 * changed, and in the order of the index.
 *
 * What was verified while the indexes were built (rewrite_verify.c) is not any more,
 * where a round has changed something: in the shadow, or in the table.
 *
 * Rounds follow each other until one finds little; what comes after that is
 * left for the cut-over.
 *
 * Easy to get wrong:
 *
 *	The key may hold the column that changes.  The log has it in the old type; in
 *	the shadow it is looked up in the new one, converted alone (refuse_key() has
 *	seen to it that this can be done).
 *
 *	A row that cannot be made must not get lost: its key goes into the log again,
 *	and is tried in each round until its row was mended.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/skey.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_am.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "replay.h"
#include "rewrite.h"
#include "risky_migrations.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/tuplesort.h"

/* a round that found no more than this was the last */
#define FEW_ROWS 1000
/* rounds in a row that do not find fewer, until the operator is asked */
#define HOPELESS_ROUNDS 20

/*-------------------------------------------------------------------------
 * Looking up by key
 *-------------------------------------------------------------------------
 */

/* the operator of a key column's operator class, with a strategy of B-trees */
static Oid
key_operator(Relation index, int i, int strategy)
{
	Oid			type = index->rd_opcintype[i];
	Oid			op = get_opfamily_member(index->rd_opfamily[i], type, type, strategy);

	if (!OidIsValid(op))
		elog(ERROR, "index %u has no operator %d for column %d", RelationGetRelid(index),
			 strategy, i + 1);
	return op;
}

/* access to the rows of a table by its key; values are set for each look-up */
RmLookup *
rm_lookup_begin(Relation rel, Oid index_oid, Snapshot snapshot)
{
	RmLookup   *l = palloc0(sizeof(RmLookup));

	l->rel = rel;
	l->index = index_open(index_oid, AccessShareLock);
	l->nkeys = IndexRelationGetNumberOfKeyAttributes(l->index);
	l->scan = rm_index_beginscan(rel, l->index, snapshot, l->nkeys);
	l->slot = table_slot_create(rel, NULL);
	for (int i = 0; i < l->nkeys; i++)
	{
		ScanKeyInit(&l->keys[i], i + 1, BTEqualStrategyNumber,
					get_opcode(key_operator(l->index, i, BTEqualStrategyNumber)), (Datum) 0);
		l->keys[i].sk_collation = l->index->rd_indcollation[i];
	}
	return l;
}

/* number of the table's column that is the key's i-th, counted from 0 */
AttrNumber
rm_lookup_attnum(RmLookup *l, int i)
{
	return l->index->rd_index->indkey.values[i];
}

/* whom to look up: the row with the key of that one */
void
rm_lookup_key_of(RmLookup *l, TupleTableSlot *slot)
{
	for (int i = 0; i < l->nkeys; i++)
	{
		bool		isnull;

		l->keys[i].sk_argument = slot_getattr(slot, rm_lookup_attnum(l, i), &isnull);
	}
}

/* the row with the key that stands in l->keys, in l->slot; false if there is none */
bool
rm_lookup(RmLookup *l)
{
	index_rescan(l->scan, l->keys, l->nkeys, NULL, 0);
	return index_getnext_slot(l->scan, ForwardScanDirection, l->slot);
}

void
rm_lookup_end(RmLookup *l)
{
	ExecDropSingleTupleTableSlot(l->slot);
	index_endscan(l->scan);
	index_close(l->index, NoLock);
	pfree(l);
}

/*-------------------------------------------------------------------------
 * One round
 *-------------------------------------------------------------------------
 */

/* all that the snapshot sees of the log goes from there into the sort */
static void
read_log(RmRound *r)
{
	TableScanDesc scan = table_beginscan(r->log, r->t->snapshot, 0, NULL);
	TupleTableSlot *slot = table_slot_create(r->log, NULL);

	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		CHECK_FOR_INTERRUPTS();
		tuplesort_puttupleslot(r->keys, slot);
		/* the scan goes by its snapshot, and does not see this */
		simple_heap_delete(r->log, &slot->tts_tid);
		r->read++;
	}
	ExecDropSingleTupleTableSlot(slot);
	table_endscan(scan);
	tuplesort_performsort(r->keys);
}

/* rows of the shadow, and of the table, that lie there have changed */
static void
note_place(Bitmapset **pages, ItemPointer tid)
{
	*pages = bms_add_member(*pages, (int) (ItemPointerGetBlockNumber(tid) / RM_CHUNK_PAGES));
}

/* takes what the log has, and is ready to go through its keys */
RmRound *
rm_round_begin(RmTransfer *t)
{
	RmRound    *r = palloc0(sizeof(RmRound));
	int			nkeys;
	AttrNumber	attnums[INDEX_MAX_KEYS];
	Oid			operators[INDEX_MAX_KEYS];
	Oid			collations[INDEX_MAX_KEYS];
	bool		nulls_first[INDEX_MAX_KEYS];

	r->t = t;
	r->log = table_open(t->rw->log, RowExclusiveLock);
	r->source = rm_lookup_begin(t->rel, t->rw->key_index, t->snapshot);
	/* what this very transaction has stored and deleted counts */
	r->target = rm_lookup_begin(t->shadow, rm_rewrite_shadow_key(t->rw), SnapshotSelf);
	r->log_slot = MakeSingleTupleTableSlot(RelationGetDescr(r->log), &TTSOpsMinimalTuple);
	r->last_slot = MakeSingleTupleTableSlot(RelationGetDescr(r->log), &TTSOpsMinimalTuple);
	r->made_slot = MakeSingleTupleTableSlot(RelationGetDescr(t->shadow), &TTSOpsHeapTuple);
	r->key_row = MakeSingleTupleTableSlot(RelationGetDescr(t->rel), &TTSOpsVirtual);
	nkeys = r->source->nkeys;
	for (int i = 0; i < nkeys; i++)
	{
		attnums[i] = i + 1;
		operators[i] = key_operator(r->source->index, i, BTLessStrategyNumber);
		collations[i] = r->source->index->rd_indcollation[i];
		nulls_first[i] = false;
		fmgr_info(r->source->keys[i].sk_func.fn_oid, &r->equal[i]);
	}
	r->keys = tuplesort_begin_heap(RelationGetDescr(r->log), nkeys, attnums, operators, collations,
								   nulls_first, maintenance_work_mem, NULL, TUPLESORT_RANDOMACCESS);
	read_log(r);
	return r;
}

void
rm_round_end(RmRound *r)
{
	ExecDropSingleTupleTableSlot(r->log_slot);
	ExecDropSingleTupleTableSlot(r->last_slot);
	ExecDropSingleTupleTableSlot(r->made_slot);
	ExecDropSingleTupleTableSlot(r->key_row);
	tuplesort_end(r->keys);
	rm_lookup_end(r->source);
	rm_lookup_end(r->target);
	table_close(r->log, NoLock);
	pfree(r);
}

/* is the key in log_slot the one before? */
static bool
same_as_last(RmRound *r)
{
	if (!r->has_last)
		return false;
	for (int i = 0; i < r->source->nkeys; i++)
	{
		bool		isnull;
		Datum		a = slot_getattr(r->log_slot, i + 1, &isnull);
		Datum		b = slot_getattr(r->last_slot, i + 1, &isnull);

		if (!DatumGetBool(FunctionCall2Coll(&r->equal[i], r->source->index->rd_indcollation[i], a, b)))
			return false;
	}
	return true;
}

/* the next key, in log_slot; false at the end, after which it begins again */
bool
rm_round_next_key(RmRound *r)
{
	while (tuplesort_gettupleslot(r->keys, true, true, r->log_slot, NULL))
	{
		CHECK_FOR_INTERRUPTS();
		if (same_as_last(r))
			continue;
		ExecCopySlot(r->last_slot, r->log_slot);
		r->has_last = true;
		return true;
	}
	tuplesort_rescan(r->keys);
	r->has_last = false;
	return false;
}

/* sets the key of a look-up in the table */
void
rm_round_source_key(RmRound *r, RmLookup *l)
{
	for (int i = 0; i < l->nkeys; i++)
	{
		bool		isnull;

		l->keys[i].sk_argument = slot_getattr(r->log_slot, i + 1, &isnull);
	}
}

/* the column of that number among those that change, or NULL */
static const RmTransferColumn *
column_of(const RmTransfer *t, AttrNumber attnum)
{
	for (int i = 0; i < t->ncolumns; i++)
		if (t->columns[i].attnum == attnum)
			return &t->columns[i];
	return NULL;
}

/*
 * The same of one in the shadow: where columns that change are part of the key, their
 * values are made from a row that has nothing but the key.  False if there can be no
 * such row, since a value does not convert.  Good until row_cxt is reset.
 */
bool
rm_round_target_key(RmRound *r, RmLookup *l)
{
	RmTransfer *t = r->t;
	TupleTableSlot *key_row = r->key_row;

	ExecStoreAllNullTuple(key_row);
	for (int i = 0; i < r->source->nkeys; i++)
	{
		AttrNumber	attnum = rm_lookup_attnum(r->source, i);

		key_row->tts_values[attnum - 1] =
			slot_getattr(r->log_slot, i + 1, &key_row->tts_isnull[attnum - 1]);
	}
	for (int i = 0; i < l->nkeys; i++)
	{
		AttrNumber	attnum = rm_lookup_attnum(l, i);
		const RmTransferColumn *c = column_of(t, attnum);
		bool		isnull;
		ErrorData  *error;

		if (c == NULL)
			l->keys[i].sk_argument = key_row->tts_values[attnum - 1];
		else if (!rm_conversion_try(c->conv, key_row, t->row_cxt, &l->keys[i].sk_argument,
									&isnull, &error) || isnull)
			return false;
	}
	return true;
}

static void
delete_rows(RmRound *r)
{
	while (rm_round_next_key(r))
	{
		MemoryContextReset(r->t->row_cxt);
		if (!rm_round_target_key(r, r->target))
			continue;
		/* there is one at most, but look: what is left would be there twice */
		while (rm_lookup(r->target))
		{
			note_place(&r->shadow_pages, &r->target->slot->tts_tid);
			simple_heap_delete(r->t->shadow, &r->target->slot->tts_tid);
		}
	}
}

/* stores a new row in the shadow, with its index entries; its place is in made_slot */
void
rm_round_insert(RmRound *r, HeapTuple tup)
{
	RmTransfer *t = r->t;

	ExecStoreHeapTuple(tup, r->made_slot, false);
	table_tuple_insert(t->shadow, r->made_slot, GetCurrentCommandId(true), 0, NULL);
	note_place(&r->shadow_pages, &r->made_slot->tts_tid);
	if (t->rri->ri_NumIndices > 0)
		rm_insert_new_index_tuples(t->rri, r->made_slot, t->estate);
	ResetPerTupleExprContext(t->estate);
}

/* makes and stores the rows under way; what cannot be made is logged again */
static void
store_rows(RmRound *r)
{
	RmTransfer *t = r->t;

	rm_transfer_make(t);
	for (int i = 0; i < t->nrows; i++)
		if (t->made[i])
		{
			note_place(&r->table_pages, &t->rows[i]->tts_tid);
			rm_round_insert(r, t->made[i]);
		}
		else
			rm_log_key(r->log, t->rows[i]);
	ExecClearTuple(r->made_slot);
	rm_transfer_clear(t);
}

static void
insert_rows(RmRound *r)
{
	RmTransfer *t = r->t;

	while (rm_round_next_key(r))
	{
		rm_round_source_key(r, r->source);
		if (!rm_lookup(r->source))
			continue;			/* deleted */
		if (rm_transfer_add_slot(t, r->source->slot))
			continue;
		store_rows(r);
		(void) rm_transfer_add_slot(t, r->source->slot);
	}
	store_rows(r);
}

/* all rows that the snapshot sees */
static int64
count_rows(Relation rel, Snapshot snapshot)
{
	TableScanDesc scan = table_beginscan(rel, snapshot, 0, NULL);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	int64		n = 0;

	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		CHECK_FOR_INTERRUPTS();
		n++;
	}
	ExecDropSingleTupleTableSlot(slot);
	table_endscan(scan);
	return n;
}

/*
 * One round, in the transaction under way; rel is locked.  What does not convert
 * is recorded and its key logged again.  With counts, the rows of the table as of
 * the round, and those of the shadow after it.  Returns the number of log rows
 * that were replayed.
 */
int64
rm_replay(RmRun *run, RmRewrite *rw, Relation rel, int64 *counts)
{
	RmTransfer *t = rm_transfer_begin(run->m, rw, rel, ShareUpdateExclusiveLock, true);
	RmRound    *r = rm_round_begin(t);
	int64		replayed;

	delete_rows(r);
	insert_rows(r);
	/* later nobody asks any more; rm_rewrite_back_to() forgets all of it */
	if (rw->steps_done <= RM_REWRITE_VERIFY)
		rm_chunks_changed(rw->shadow, r->shadow_pages, r->table_pages);
	rw->rows_failed = t->failed;
	replayed = r->read - t->failed;
	/* another round of the same transaction may meet the same rows */
	CommandCounterIncrement();
	if (counts)
	{
		counts[0] = count_rows(rel, t->snapshot);
		counts[1] = count_rows(t->shadow, SnapshotSelf) + t->failed;
	}
	rm_round_end(r);
	rm_transfer_end(t);
	run->rows_changed += replayed;
	return replayed;
}

/*-------------------------------------------------------------------------
 * The step
 *-------------------------------------------------------------------------
 */

/* catching up; lives across transactions */
typedef struct CatchUp
{
	Oid			relid;			/* of which table this is */
	int64		last;			/* rows of the last round */
	int			hopeless;		/* rounds in a row that did not find fewer */
} CatchUp;

/* a round beside everybody, in a transaction of its own; returns the rows that were replayed */
int64
rm_replay_round(RmRun *run, RmRewrite *rw, Relation rel, int64 *counts)
{
	int64		n = rm_replay(run, rw, rel, counts);

	rm_rewrite_save(rw);
	run->async_commit = true;
	run->may_hold = true;
	return n;
}

static RmStepResult
catch_up_apply(RmRun *run)
{
	Relation	rel;
	RmStepResult result;
	RmRewrite  *rw = rm_rewrite_next(run, &rel, &result);
	CatchUp    *c = run->work;
	int64		n;

	if (rw == NULL)
		return result;
	if (c == NULL)
		c = run->work = MemoryContextAllocZero(run->cxt, sizeof(CatchUp));
	if (c->relid != rw->relid)
		*c = (CatchUp) {.relid = rw->relid};
	n = rm_replay_round(run, rw, rel, NULL);
	table_close(rel, NoLock);
	run->progress.rows_done = run->rows_changed;
	if (n <= FEW_ROWS)
		return rm_rewrite_table_done(run, rw);
	c->hopeless = n >= c->last ? c->hopeless + 1 : 0;
	c->last = n;
	if (c->hopeless >= HOPELESS_ROUNDS)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the application writes %s faster than its changes can be replayed",
						run->relation),
				 errdetail("%d rounds in a row did not find fewer changes than the one before; the last one found %lld.",
						   HOPELESS_ROUNDS, (long long) n),
				 errhint("SELECT rm_resume(%lld) at a quieter hour; what is done stays.",
						 (long long) run->migration_id)));
	return RM_STEP_AGAIN;
}

const RmStep rm_step_rewrite_catch_up = {
	.name = "catch_up",
	.throttled = true,
	.apply = catch_up_apply,
	.revert = rm_rewrite_nothing,
	.explain = rm_rewrite_explain,
};
