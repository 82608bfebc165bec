/*-------------------------------------------------------------------------
 *
 * rewrite_verify.c
 *	  online_rewrite: the step "verify".
 *
 * Every row of the table that a snapshot sees is made anew and compared with the
 * one that the shadow has under its key, column by column, to the letter.  A row
 * that differs may have changed since the last round of catching up: then its key
 * is in the log, as the snapshot sees that, and the next round sees to it.
 * Otherwise the shadow is wrong, and nothing is exchanged.
 *
 * Nothing is replayed meanwhile, so the shadow stands still, and most of its rows
 * lie in the order of the table's.  So both are read in that order, side by side:
 * as long as the next row of the shadow is what the next row of the table
 * becomes, nothing has to be looked up.  Where it is not (one of the two was
 * changed, and lies somewhere else) the row is looked up by its key, and the
 * reading of the shadow goes on behind it if that is near.
 *
 * A row of the shadow that was passed over on the way has the key of a row of the
 * table, which is or was looked up, or it is in the log; else it is one too many.
 * Where the key itself is converted, so that the table's key cannot be told from
 * the shadow's, the rows are counted instead: those of the table, after a round
 * and with its snapshot.
 *
 * Easy to get wrong: a row of the shadow has to be looked at once, also by a run
 * that goes on where another was interrupted.  So how far the shadow was read
 * is in the state row, as how far the table was.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/nbtree.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/namespace.h"
#include "executor/executor.h"
#include "leaves.h"
#include "miscadmin.h"
#include "replay.h"
#include "rewrite.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* how long one transaction compares, milliseconds */
#define VERIFY_TIME 250
#define PAGES_AT_ONCE 64
/* reading goes on behind a row that is found within so many pages, */
#define NEAR_PAGES 8
/* or after so many, one after the other, that were not */
#define MANY_ASTRAY 1000
/* rows that the log is read for at once */
#define MANY_SUSPECTS 10000

enum
{
	VERIFY_BEGIN,
	VERIFY_ROWS,
	VERIFY_COUNT
};

/* are the two rows of the shadow equal, to the letter? */
static bool
same_row(TupleDesc desc, TupleTableSlot *a, TupleTableSlot *b)
{
	slot_getallattrs(a);
	slot_getallattrs(b);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped)
			continue;
		if (a->tts_isnull[i] != b->tts_isnull[i] ||
			(!a->tts_isnull[i] &&
			 !datum_image_eq(a->tts_values[i], b->tts_values[i], att->attbyval, att->attlen)))
			return false;
	}
	return true;
}

/*-------------------------------------------------------------------------
 * Reading the shadow beside the table
 *-------------------------------------------------------------------------
 */

typedef struct Suspect
{
	Datum	   *key;			/* in the types of the table */
	char	   *name;
	bool		surplus;		/* of the shadow, without one of the table */
	bool		logged;
} Suspect;

/* one transaction of verifying */
typedef struct Verify
{
	RmTransfer *t;
	RmLookup   *shadow;			/* by key */
	RmLookup   *source;			/* the table, by key */
	bool		key_converts;	/* the column is part of the key */
	TupleTableSlot *made_slot;	/* what a row should be */
	/* the next row of the shadow, in the order of its pages */
	TableScanDesc scan;
	TupleTableSlot *next;
	bool		at_end;
	int			astray;			/* rows in a row that were found elsewhere */
	/* rows that are right only if the log has them */
	Suspect    *suspects;
	int			nsuspects;
	MemoryContext suspects_cxt;
	FmgrInfo	compare[INDEX_MAX_KEYS];
} Verify;

/*
 * Suspects
 */

static int
compare_suspects(const void *a, const void *b, void *arg)
{
	Verify	   *v = arg;

	for (int i = 0; i < v->source->nkeys; i++)
	{
		int			c = DatumGetInt32(FunctionCall2Coll(&v->compare[i],
														v->source->index->rd_indcollation[i],
														((const Suspect *) a)->key[i],
														((const Suspect *) b)->key[i]));

		if (c != 0)
			return c;
	}
	return 0;
}

/* all with that key are in the log */
static void
acquit(Verify *v, const Suspect *key)
{
	Suspect    *s = bsearch_arg(key, v->suspects, v->nsuspects, sizeof(Suspect), compare_suspects, v);

	if (s == NULL)
		return;
	while (s > v->suspects && compare_suspects(s - 1, key, v) == 0)
		s--;
	for (; s < v->suspects + v->nsuspects && compare_suspects(s, key, v) == 0; s++)
		s->logged = true;
}

/* reads the log once for all of them; XX001 if it does not have one */
static void
judge_suspects(Verify *v)
{
	RmTransfer *t = v->t;
	Relation	log;
	TableScanDesc scan;
	TupleTableSlot *slot;

	if (v->nsuspects == 0)
		return;
	qsort_arg(v->suspects, v->nsuspects, sizeof(Suspect), compare_suspects, v);
	log = table_open(t->rw->log, AccessShareLock);
	scan = table_beginscan(log, t->snapshot, 0, NULL);
	slot = table_slot_create(log, NULL);
	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		Datum		key[INDEX_MAX_KEYS];
		Suspect		logged = {.key = key};
		bool		isnull;

		CHECK_FOR_INTERRUPTS();
		for (int i = 0; i < v->source->nkeys; i++)
			key[i] = slot_getattr(slot, i + 1, &isnull);
		acquit(v, &logged);
	}
	ExecDropSingleTupleTableSlot(slot);
	table_endscan(scan);
	table_close(log, NoLock);
	for (int i = 0; i < v->nsuspects; i++)
		if (!v->suspects[i].logged)
			ereport(ERROR,
					(errcode(ERRCODE_DATA_CORRUPTED),
					 v->suspects[i].surplus ?
					 errmsg("the shadow table of %s has a row %s that the table does not have",
							t->m->relation, v->suspects[i].name) :
					 errmsg("row %s of %s is not what it should be in the shadow table",
							v->suspects[i].name, t->m->relation),
					 errdetail("It has not been changed since it was last brought over. Nothing has been exchanged."),
					 errhint("Give the migration up with CALL rm_rollback(%lld), and report it.",
							 (long long) t->m->id)));
	v->nsuspects = 0;
	MemoryContextReset(v->suspects_cxt);
}

/* a row of the table, or of the shadow, that is right only if the log has it */
static void
suspect(Verify *v, TupleTableSlot *row, bool surplus)
{
	MemoryContext oldcxt;
	Suspect    *s;

	if (v->nsuspects == MANY_SUSPECTS)
		judge_suspects(v);
	if (v->suspects == NULL)
		v->suspects = palloc(sizeof(Suspect) * MANY_SUSPECTS);
	s = &v->suspects[v->nsuspects++];
	oldcxt = MemoryContextSwitchTo(v->suspects_cxt);
	s->name = rm_row_key(v->t->rel, row);
	s->surplus = surplus;
	s->logged = false;
	s->key = palloc(sizeof(Datum) * v->source->nkeys);
	for (int i = 0; i < v->source->nkeys; i++)
	{
		AttrNumber	attnum = rm_lookup_attnum(v->source, i);
		Form_pg_attribute att = TupleDescAttr(row->tts_tupleDescriptor, attnum - 1);
		bool		isnull;

		s->key[i] = datumCopy(slot_getattr(row, attnum, &isnull), att->attbyval, att->attlen);
	}
	MemoryContextSwitchTo(oldcxt);
}

/*
 * The shadow, in the order of its pages
 */

/* the first row at tid or behind it becomes the next one */
static void
read_from(Verify *v, ItemPointer tid)
{
	ItemPointerData end;

	if (v->scan)
		table_endscan(v->scan);
	ItemPointerSet(&end, InvalidBlockNumber - 1, MaxOffsetNumber);
	v->scan = table_beginscan_tidrange(v->t->shadow, v->t->snapshot, tid, &end);
	v->at_end = !table_scan_getnextslot_tidrange(v->scan, ForwardScanDirection, v->next);
}

static void
read_on(Verify *v)
{
	if (!v->at_end)
		v->at_end = !table_scan_getnextslot_tidrange(v->scan, ForwardScanDirection, v->next);
}

/* a row of the shadow that is not the next one of the table: is it one too many? */
static void
check_passed_over(Verify *v)
{
	if (v->key_converts)
		return;					/* they are counted */
	rm_lookup_key_of(v->source, v->next);
	if (!rm_lookup(v->source))
		suspect(v, v->next, true);
}

/* reads on until the row at tid is behind us */
static void
pass_over(Verify *v, ItemPointer tid)
{
	while (!v->at_end && ItemPointerCompare(&v->next->tts_tid, tid) < 0)
	{
		CHECK_FOR_INTERRUPTS();
		check_passed_over(v);
		read_on(v);
	}
	if (!v->at_end && ItemPointerEquals(&v->next->tts_tid, tid))
		read_on(v);
}

/* the row was found at tid by its key: does the reading go on there? */
static void
follow(Verify *v, ItemPointer tid)
{
	BlockNumber found = ItemPointerGetBlockNumber(tid);
	BlockNumber here;

	if (v->at_end || ItemPointerCompare(tid, &v->next->tts_tid) < 0)
		return;
	here = ItemPointerGetBlockNumber(&v->next->tts_tid);
	if (found - here > NEAR_PAGES && ++v->astray < MANY_ASTRAY)
		return;
	pass_over(v, tid);
	v->astray = 0;
}

static void
verify_row(Verify *v, int i)
{
	RmTransfer *t = v->t;
	TupleDesc	desc = RelationGetDescr(t->shadow);

	if (t->made[i])
	{
		ExecStoreHeapTuple(t->made[i], v->made_slot, false);
		if (!v->at_end && same_row(desc, v->made_slot, v->next))
		{
			read_on(v);
			v->astray = 0;
			return;
		}
		rm_lookup_key_of(v->shadow, v->made_slot);
		if (rm_lookup(v->shadow))
		{
			follow(v, &v->shadow->slot->tts_tid);
			if (same_row(desc, v->made_slot, v->shadow->slot))
				return;
		}
	}
	suspect(v, t->rows[i], false);
}

static int
verify_rows(Verify *v)
{
	RmTransfer *t = v->t;
	int			n = t->nrows;

	rm_transfer_make(t);
	for (int i = 0; i < n; i++)
		verify_row(v, i);
	ExecClearTuple(v->made_slot);
	rm_transfer_clear(t);
	return n;
}

static Verify *
verify_begin(RmRewrite *rw, RmTransfer *t)
{
	Verify	   *v = palloc0(sizeof(Verify));
	ItemPointerData tid;

	v->t = t;
	v->shadow = rm_lookup_begin(t->shadow, rm_rewrite_shadow_key(rw), t->snapshot);
	v->source = rm_lookup_begin(t->rel, rw->key_index, t->snapshot);
	for (int i = 0; i < v->source->nkeys; i++)
		fmgr_info_copy(&v->compare[i], index_getprocinfo(v->source->index, i + 1, BTORDER_PROC),
					   CurrentMemoryContext);
	v->key_converts = rm_rewrite_key_converts(rw);
	v->suspects_cxt = AllocSetContextCreate(CurrentMemoryContext, "rm suspects", ALLOCSET_DEFAULT_SIZES);
	v->made_slot = MakeSingleTupleTableSlot(RelationGetDescr(t->shadow), &TTSOpsHeapTuple);
	v->next = table_slot_create(t->shadow, NULL);
	ItemPointerSet(&tid, ItemPointerGetBlockNumberNoCheck(&rw->verified),
				   ItemPointerGetOffsetNumberNoCheck(&rw->verified));
	read_from(v, &tid);
	return v;
}

/* judges, and puts into the state row how far the shadow was read */
static void
verify_end(Verify *v)
{
	judge_suspects(v);
	if (v->at_end)
		ItemPointerSet(&v->t->rw->verified, InvalidBlockNumber - 1, FirstOffsetNumber);
	else
		v->t->rw->verified = v->next->tts_tid;
	table_endscan(v->scan);
	ExecDropSingleTupleTableSlot(v->next);
	ExecDropSingleTupleTableSlot(v->made_slot);
	rm_lookup_end(v->shadow);
	rm_lookup_end(v->source);
	MemoryContextDelete(v->suspects_cxt);
	if (v->suspects)
		pfree(v->suspects);
	pfree(v);
}

/*-------------------------------------------------------------------------
 * The step
 *-------------------------------------------------------------------------
 */

/* a range of pages; moves next_block.  Returns the rows that were compared */
static int64
verify_range(RmRun *run, RmRewrite *rw, Relation rel, BlockNumber end)
{
	RmMigration *m = run->m;
	RmTransfer *t = rm_transfer_begin(m, rw, rel, ShareUpdateExclusiveLock, false);
	Verify	   *v = verify_begin(rw, t);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	BlockNumber block = m->next_block;
	instr_time	started;
	int64		checked = 0;

	INSTR_TIME_SET_CURRENT(started);
	while (block < end && rm_elapsed_ms(started) < VERIFY_TIME)
	{
		ItemPointerData low;
		ItemPointerData high;
		TableScanDesc scan;

		CHECK_FOR_INTERRUPTS();
		ItemPointerSet(&low, block, FirstOffsetNumber);
		block = Min(end, block + PAGES_AT_ONCE);
		ItemPointerSet(&high, block - 1, MaxOffsetNumber);
		scan = table_beginscan_tidrange(rel, t->snapshot, &low, &high);
		while (table_scan_getnextslot_tidrange(scan, ForwardScanDirection, slot))
		{
			TupleTableSlot *row = rm_transfer_next(t);

			if (row == NULL)
			{
				checked += verify_rows(v);
				row = rm_transfer_next(t);
			}
			ExecCopySlot(row, slot);
		}
		table_endscan(scan);
	}
	checked += verify_rows(v);
	m->next_block = block;
	ExecDropSingleTupleTableSlot(slot);
	verify_end(v);
	rm_transfer_end(t);
	return checked;
}

/* what the shadow has behind the last row that was looked at */
static void
verify_rest(RmRun *run, RmRewrite *rw, Relation rel)
{
	RmTransfer *t = rm_transfer_begin(run->m, rw, rel, ShareUpdateExclusiveLock, false);
	Verify	   *v = verify_begin(rw, t);

	while (!v->at_end)
	{
		CHECK_FOR_INTERRUPTS();
		check_passed_over(v);
		read_on(v);
	}
	verify_end(v);
	rm_transfer_end(t);
}

/* one round more, and with its snapshot both are counted */
static void
verify_count(RmRun *run, RmRewrite *rw, Relation rel)
{
	int64		counts[2];

	(void) rm_replay_round(run, rw, rel, counts);
	if (counts[0] != counts[1])
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("the shadow table of %s has %lld rows instead of %lld",
						run->relation, (long long) counts[1], (long long) counts[0]),
				 errdetail("Nothing has been exchanged."),
				 errhint("Give the migration up with CALL rm_rollback(%lld), and report it.",
						 (long long) run->migration_id)));
}

static RmStepResult
verify_apply(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;
	RmStepResult result;
	RmRewrite  *rw = rm_rewrite_next(run, &rel, &result);
	BlockNumber end;
	bool		done = false;

	if (rw == NULL)
		return result;
	if (m->phase == VERIFY_BEGIN)
	{
		rm_backfill_fix_end(m, rel);
		if (!rm_is_parted(m))
			m->rows_done = 0;
		ItemPointerSet(&rw->verified, 0, FirstOffsetNumber);
		m->phase = VERIFY_ROWS;
	}
	end = Min(m->end_block, RelationGetNumberOfBlocks(rel));
	if (m->phase == VERIFY_COUNT)
	{
		verify_count(run, rw, rel);
		done = true;
	}
	else if (m->next_block < end)
		m->rows_done += verify_range(run, rw, rel, end);
	else if (!rm_rewrite_key_converts(rw))
	{
		verify_rest(run, rw, rel);
		done = true;
	}
	else
		m->phase = VERIFY_COUNT;
	table_close(rel, NoLock);
	rm_rewrite_save(rw);
	run->progress.blocks_done = m->next_block;
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = m->rows_done;
	rm_rewrite_progress(run, rw);
	run->may_hold = true;
	return done ? rm_rewrite_table_done(run, rw) : RM_STEP_AGAIN;
}

const RmStep rm_step_rewrite_verify = {
	.name = "verify",
	.throttled = true,
	.apply = verify_apply,
	.revert = rm_rewrite_nothing,
};
