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
 * That the shadow has no row too many is told by counting both, after a round and
 * with its snapshot.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/namespace.h"
#include "executor/executor.h"
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

/* does the log, as the snapshot sees it, have the key of the row in slot? */
static bool
is_logged(RmTransfer *t, RmLookup *shadow)
{
	Relation	log = table_open(t->rw->log, AccessShareLock);
	TableScanDesc scan = table_beginscan(log, t->snapshot, 0, NULL);
	TupleTableSlot *slot = table_slot_create(log, NULL);
	RmLookup   *source = rm_lookup_begin(t->rel, t->rw->key_index, t->snapshot);
	bool		found = false;

	while (!found && table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		bool		isnull;

		if (DatumGetChar(slot_getattr(slot, 1, &isnull)) == RM_LOG_TRUNCATED)
		{
			found = true;
			break;
		}
		/* by the index, so that what it takes for equal is equal */
		for (int i = 0; i < source->nkeys; i++)
			source->keys[i].sk_argument = slot_getattr(slot, i + 2, &isnull);
		found = rm_lookup(source) &&
			ItemPointerEquals(&source->slot->tts_tid, &t->slot->tts_tid);
	}
	rm_lookup_end(source);
	ExecDropSingleTupleTableSlot(slot);
	table_endscan(scan);
	table_close(log, NoLock);
	return found;
}

static void
verify_row(RmTransfer *t, RmLookup *shadow)
{
	ErrorData  *error;
	bool		equal = false;

	if (rm_transfer_try(t, &error))
	{
		rm_lookup_key_of(shadow, t->new_slot);
		equal = rm_lookup(shadow) &&
			same_row(RelationGetDescr(t->shadow), t->new_slot, shadow->slot);
	}
	else if (t->m->null_on_error && rm_transfer_settle(t, error))
	{
		rm_lookup_key_of(shadow, t->new_slot);
		equal = rm_lookup(shadow) &&
			same_row(RelationGetDescr(t->shadow), t->new_slot, shadow->slot);
	}
	if (!equal && !is_logged(t, shadow))
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("row %s of %s is not what it should be in the shadow table",
						rm_row_key(t->rel, t->slot), t->m->relation),
				 errdetail("It has not been changed since it was last brought over. Nothing has been exchanged."),
				 errhint("Give the migration up with CALL rm_rollback(%lld), and report it.",
						 (long long) t->m->id)));
}

/* a range of pages; moves next_block */
static int64
verify_range(RmRun *run, RmRewrite *rw, Relation rel, BlockNumber end)
{
	RmMigration *m = run->m;
	RmTransfer *t = rm_transfer_begin(m, rw, rel, ShareUpdateExclusiveLock, false);
	RmLookup   *shadow = rm_lookup_begin(t->shadow,
										 get_relname_relid(rm_rewrite_index_name(m, rw->key_index),
														   get_namespace_oid(RM_SCHEMA, false)),
										 t->snapshot);
	TableScanDesc scan = table_beginscan(rel, t->snapshot, 0, NULL);
	BlockNumber block = m->next_block;
	instr_time	started;
	int64		checked = 0;

	INSTR_TIME_SET_CURRENT(started);
	table_endscan(scan);
	while (block < end)
	{
		ItemPointerData low;
		ItemPointerData high;

		CHECK_FOR_INTERRUPTS();
		ItemPointerSet(&low, block, FirstOffsetNumber);
		block = Min(end, block + 64);
		ItemPointerSet(&high, block - 1, MaxOffsetNumber);
		scan = table_beginscan_tidrange(rel, t->snapshot, &low, &high);
		while (table_scan_getnextslot_tidrange(scan, ForwardScanDirection, t->slot))
		{
			MemoryContextReset(t->row_cxt);
			verify_row(t, shadow);
			checked++;
		}
		table_endscan(scan);
		if (rm_elapsed_ms(started) > VERIFY_TIME)
			break;
	}
	m->next_block = block;
	rm_lookup_end(shadow);
	rm_transfer_end(t);
	return checked;
}

static RmStepResult
verify_apply(RmRun *run)
{
	RmMigration *m = run->m;
	RmRewrite  *rw = rm_rewrite_load(m);
	Relation	rel;
	int64		counts[2];
	RmStepResult result;
	const char *missed;

	if (m->phase == VERIFY_COUNT)
	{
		(void) rm_replay_round(run, rw, AccessShareLock, counts, &result);
		if (result == RM_STEP_BACK)
			return result;
		if (counts[0] != counts[1])
			ereport(ERROR,
					(errcode(ERRCODE_DATA_CORRUPTED),
					 errmsg("the shadow table of %s has %lld rows instead of %lld",
							run->relation, (long long) counts[1], (long long) counts[0]),
					 errdetail("Nothing has been exchanged."),
					 errhint("Give the migration up with CALL rm_rollback(%lld), and report it.",
							 (long long) m->id)));
		return RM_STEP_DONE;
	}

	rm_lock_relation(&run->locks, m->relid, AccessShareLock);
	rel = table_open(m->relid, NoLock);
	rm_rewrite_check_ground(m, rw, rel);
	missed = rm_rewrite_missed(m, rw, rel);
	if (missed)
	{
		table_close(rel, NoLock);
		return rm_rewrite_start_over(run, missed);
	}
	if (m->phase == VERIFY_BEGIN)
	{
		rm_backfill_fix_end(m, rel);
		m->rows_done = 0;
		m->phase = VERIFY_ROWS;
	}
	else
		m->rows_done += verify_range(run, rw, rel,
									 Min(m->end_block, RelationGetNumberOfBlocks(rel)));
	if (m->next_block >= Min(m->end_block, RelationGetNumberOfBlocks(rel)))
		m->phase = VERIFY_COUNT;
	table_close(rel, NoLock);
	run->progress.blocks_done = m->next_block;
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = m->rows_done;
	run->may_hold = true;
	return RM_STEP_AGAIN;
}

const RmStep rm_step_rewrite_verify = {
	.name = "verify",
	.throttled = true,
	.apply = verify_apply,
	.revert = rm_rewrite_nothing,
};
