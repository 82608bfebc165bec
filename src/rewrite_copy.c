/*-------------------------------------------------------------------------
 *
 * rewrite_copy.c
 *	  online_rewrite: the step "copy".
 *
 * The table is read page by page, in short transactions.  Of the row versions
 * that a transaction's snapshot sees, those are copied whose xmin had ended when
 * the change log began (S0); all others are in the log already.  A version that
 * cannot be judged is not copied either, and its key is put into the log.
 *
 * The new rows are put on pages that nobody else knows, whole pages, appended
 * to the shadow and written to the WAL as images.  They are frozen, and the pages
 * all-visible, from the beginning: the rows had been committed before anybody's
 * snapshot that may still be in use when the shadow takes the table's place
 * (the cut-over waits for that), and nobody has to come back to them, neither
 * VACUUM nor the first reader with its hint bits.
 *
 * Frozen rows do not go away with the transaction that stored them.  How many
 * pages of the shadow are good is in the state row, written in the same
 * transaction; the next one cuts the shadow back to that before it appends.  So
 * an error or a crash at any point leaves no row twice.
 *
 * Which transactions may be open beside it does not matter: the copy locks
 * nothing but ACCESS SHARE on the table, for as long as a range of pages takes.
 *
 * Easy to get wrong:
 *
 *	A frozen version keeps its raw xmin, which may be of an earlier epoch: by the
 *	number alone it could look like one that was made after S0.  It cannot be
 *	judged, then.
 *
 *	Page numbers mean something for one relfilenode only: with other storage all
 *	begins again (rm_rewrite_missed).
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/heaptoast.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/visibilitymap.h"
#include "access/xact.h"
#include "access/xloginsert.h"
#include "catalog/storage.h"
#include "compat.h"
#include "miscadmin.h"
#include "rewrite.h"
#include "rows.h"
#include "risky_migrations.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "storage/bufpage.h"
#include "storage/lmgr.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* how long one transaction copies, milliseconds, and pages, at most */
#define COPY_TIME 250
#define COPY_PAGES 16384

/* pages of the shadow under construction */
typedef struct PageWriter
{
	Relation	rel;
	PGAlignedBlock page;
	bool		started;		/* the page has a row */
	Size		keep_free;		/* fillfactor */
	BlockNumber next;			/* number that it will have */
	Buffer		vmbuf;
	BufferAccessStrategy strategy;
} PageWriter;

/*-------------------------------------------------------------------------
 * Pages
 *-------------------------------------------------------------------------
 */

static void
writer_begin(PageWriter *w, Relation rel, BlockNumber next)
{
	w->rel = rel;
	w->started = false;
	w->keep_free = RelationGetTargetPageFreeSpace(rel, HEAP_DEFAULT_FILLFACTOR);
	w->next = next;
	w->vmbuf = InvalidBuffer;
	w->strategy = GetAccessStrategy(BAS_BULKWRITE);
}

/* the rows on the page know their place */
static void
set_places(Page page, BlockNumber block)
{
	OffsetNumber max = PageGetMaxOffsetNumber(page);

	for (OffsetNumber off = FirstOffsetNumber; off <= max; off = OffsetNumberNext(off))
	{
		HeapTupleHeader tup = (HeapTupleHeader) PageGetItem(page, PageGetItemId(page, off));

		ItemPointerSet(&tup->t_ctid, block, off);
	}
}

/* appends the page to the shadow */
static void
writer_flush(PageWriter *w)
{
	Buffer		buf;

	if (!w->started)
		return;
	visibilitymap_pin(w->rel, w->next, &w->vmbuf);
	buf = rm_extend(w->rel, w->strategy);
	if (BufferGetBlockNumber(buf) != w->next)
		elog(ERROR, "page %u of the shadow was to be appended, it is %u", w->next,
			 BufferGetBlockNumber(buf));
	set_places(w->page.data, w->next);
	PageSetAllVisible(w->page.data);

	START_CRIT_SECTION();
	memcpy(BufferGetPage(buf), w->page.data, BLCKSZ);
	MarkBufferDirty(buf);
	if (RelationNeedsWAL(w->rel))
		log_newpage_buffer(buf, true);
	END_CRIT_SECTION();

	visibilitymap_set(w->rel, w->next, buf, InvalidXLogRecPtr, w->vmbuf, InvalidTransactionId,
					  VISIBILITYMAP_ALL_VISIBLE | VISIBILITYMAP_ALL_FROZEN);
	UnlockReleaseBuffer(buf);
	w->next++;
	w->started = false;
}

static void
writer_end(PageWriter *w)
{
	writer_flush(w);
	if (BufferIsValid(w->vmbuf))
		ReleaseBuffer(w->vmbuf);
	FreeAccessStrategy(w->strategy);
}

/* adds a row, frozen; large values go into the TOAST table */
static void
writer_add(PageWriter *w, HeapTuple tup)
{
	HeapTupleHeader header;
	Size		len;

	if (HeapTupleHasExternal(tup) || tup->t_len > TOAST_TUPLE_THRESHOLD)
		tup = heap_toast_insert_or_update(w->rel, tup, NULL, HEAP_INSERT_SKIP_FSM | HEAP_INSERT_NO_LOGICAL);
	header = tup->t_data;
	header->t_infomask &= ~HEAP_XACT_MASK;
	header->t_infomask2 &= ~HEAP2_XACT_MASK;
	header->t_infomask |= HEAP_XMAX_INVALID;
	HeapTupleHeaderSetXmin(header, GetCurrentTransactionId());
	HeapTupleHeaderSetXminFrozen(header);
	HeapTupleHeaderSetCmin(header, FirstCommandId);
	HeapTupleHeaderSetXmax(header, InvalidTransactionId);

	len = MAXALIGN(tup->t_len);
	if (len > MaxHeapTupleSize)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("row is too big: size %zu, maximum size %zu", len, MaxHeapTupleSize)));
	if (w->started && len + w->keep_free > PageGetHeapFreeSpace(w->page.data))
		writer_flush(w);
	if (!w->started)
	{
		PageInit(w->page.data, BLCKSZ, 0);
		w->started = true;
	}
	if (PageAddItem(w->page.data, (Item) header, tup->t_len, InvalidOffsetNumber, false, true) ==
		InvalidOffsetNumber)
		elog(ERROR, "could not add a row to a page of the shadow");
}

/*-------------------------------------------------------------------------
 * Which rows
 *-------------------------------------------------------------------------
 */

typedef enum Verdict
{
	OLD,						/* was there when the log began */
	LOGGED,						/* made since: the log has it */
	UNKNOWN
} Verdict;

/* see the top of the file; only of versions that a snapshot sees */
static Verdict
judge(const RmRewrite *rw, HeapTupleHeader tup)
{
	TransactionId xmin = HeapTupleHeaderGetRawXmin(tup);
	TransactionId next = (TransactionId) rw->next_xid;
	int			low = 0;
	int			high = rw->nrunning;

	if (!TransactionIdIsNormal(xmin) || TransactionIdPrecedes(xmin, rw->xmin))
		return OLD;
	if (HeapTupleHeaderXminFrozen(tup))
		/* what has not even begun by now is of an earlier epoch */
		return TransactionIdPrecedes(xmin, ReadNextTransactionId()) ? UNKNOWN : OLD;
	if (TransactionIdFollowsOrEquals(xmin, next))
		return LOGGED;
	while (low < high)
	{
		int			mid = (low + high) / 2;

		if (rw->running[mid] == xmin)
			return LOGGED;
		if (rw->running[mid] < xmin)
			low = mid + 1;
		else
			high = mid;
	}
	return rw->overflowed ? UNKNOWN : OLD;
}

/* offsets of the versions on a pinned page that are to be copied, or logged */
static int
rows_on_page(RmTransfer *t, Buffer buf, OffsetNumber *offsets, bool *unknown)
{
	Page		page;
	BlockNumber block = BufferGetBlockNumber(buf);
	OffsetNumber max;
	bool		all_visible;
	int			n = 0;

	LockBuffer(buf, BUFFER_LOCK_SHARE);
	page = BufferGetPage(buf);
	max = PageGetMaxOffsetNumber(page);
	all_visible = PageIsAllVisible(page);
	for (OffsetNumber off = FirstOffsetNumber; off <= max; off = OffsetNumberNext(off))
	{
		ItemId		lp = PageGetItemId(page, off);
		HeapTupleData tup;
		Verdict		verdict;

		if (!ItemIdIsNormal(lp))
			continue;
		tup.t_data = (HeapTupleHeader) PageGetItem(page, lp);
		tup.t_len = ItemIdGetLength(lp);
		tup.t_tableOid = RelationGetRelid(t->rel);
		ItemPointerSet(&tup.t_self, block, off);
		if (!all_visible && !HeapTupleSatisfiesVisibility(&tup, t->snapshot, buf))
			continue;
		verdict = judge(t->rw, tup.t_data);
		if (verdict == LOGGED)
			continue;
		unknown[n] = verdict == UNKNOWN;
		offsets[n++] = off;
	}
	LockBuffer(buf, BUFFER_LOCK_UNLOCK);
	return n;
}

/* the slot gets the row of that place on a pinned page, and a pin of its own */
static void
store_in_slot(TupleTableSlot *slot, Oid relid, Buffer buf, OffsetNumber off)
{
	Page		page = BufferGetPage(buf);
	ItemId		lp = PageGetItemId(page, off);
	HeapTuple	tup = &((BufferHeapTupleTableSlot *) slot)->base.tupdata;

	tup->t_data = (HeapTupleHeader) PageGetItem(page, lp);
	tup->t_len = ItemIdGetLength(lp);
	tup->t_tableOid = relid;
	ItemPointerSet(&tup->t_self, BufferGetBlockNumber(buf), off);
	ExecStoreBufferHeapTuple(tup, slot, buf);
}

/* makes and appends the rows under way; returns how many could be made */
static int
copy_rows(RmTransfer *t, PageWriter *w, Relation log)
{
	int			copied = 0;

	rm_transfer_make(t);
	for (int i = 0; i < t->nrows; i++)
		if (t->made[i])
		{
			writer_add(w, t->made[i]);
			copied++;
		}
		else
			rm_log_key(log, t->rows[i]);
	rm_transfer_clear(t);
	return copied;
}

/* one page of the table; returns the rows that were copied */
static int
copy_page(RmTransfer *t, PageWriter *w, Relation log, Buffer buf)
{
	OffsetNumber offsets[MaxHeapTuplesPerPage];
	bool		unknown[MaxHeapTuplesPerPage];
	int			n = rows_on_page(t, buf, offsets, unknown);
	int			copied = 0;

	for (int i = 0; i < n; i++)
	{
		TupleTableSlot *slot = rm_transfer_next(t);

		if (slot == NULL)
		{
			copied += copy_rows(t, w, log);
			slot = rm_transfer_next(t);
		}
		store_in_slot(slot, RelationGetRelid(t->rel), buf, offsets[i]);
		if (unknown[i])
		{
			rm_log_key(log, slot);
			t->nrows--;
		}
	}
	return copied + copy_rows(t, w, log);
}

/*-------------------------------------------------------------------------
 * The step
 *-------------------------------------------------------------------------
 */

/*
 * What a failed transaction has appended goes.  False if the shadow lacks pages: an
 * unlogged table, and with it the shadow, is empty after a crash.
 */
static bool
cut_back(RmRewrite *rw)
{
	Relation	shadow = table_open(rw->shadow, ShareUpdateExclusiveLock);
	BlockNumber blocks = RelationGetNumberOfBlocks(shadow);

	if (blocks > rw->shadow_blocks)
	{
		LockRelationOid(rw->shadow, AccessExclusiveLock);
		RelationTruncate(shadow, (BlockNumber) rw->shadow_blocks);
	}
	table_close(shadow, NoLock);
	return blocks >= rw->shadow_blocks;
}

/* a range of pages; moves next_block */
static void
copy_range(RmRun *run, RmRewrite *rw, Relation rel, BlockNumber end)
{
	RmMigration *m = run->m;
	RmTransfer *t = rm_transfer_begin(m, rw, rel, ShareUpdateExclusiveLock, false);
	Relation	log = table_open(rw->log, RowExclusiveLock);
	BlockNumber block = m->next_block;
	BlockNumber stop = Min((int64) end, m->next_block + COPY_PAGES);
	BufferAccessStrategy strategy = GetAccessStrategy(BAS_BULKREAD);
	PageWriter *w = palloc(sizeof(PageWriter));
	int64		copied = 0;
	instr_time	started;

	writer_begin(w, t->shadow, (BlockNumber) rw->shadow_blocks);
	INSTR_TIME_SET_CURRENT(started);
	while (block < stop && copied < run->batch)
	{
		Buffer		buf;

		CHECK_FOR_INTERRUPTS();
		buf = ReadBufferExtended(rel, MAIN_FORKNUM, block++, RBM_NORMAL, strategy);
		copied += copy_page(t, w, log, buf);
		ReleaseBuffer(buf);
		if (block % 64 == 0 && rm_elapsed_ms(started) > COPY_TIME)
			break;
	}
	writer_end(w);
	rw->shadow_blocks = w->next;
	pfree(w);
	FreeAccessStrategy(strategy);
	table_close(log, NoLock);
	rm_transfer_end(t);
	m->next_block = block;
	m->rows_done += copied;
	run->rows_changed += copied;
}

static RmStepResult
copy_apply(RmRun *run)
{
	RmMigration *m = run->m;
	RmRewrite  *rw;
	Relation	rel;
	BlockNumber end;
	RmStepResult result;

	if (m->phase != RM_BEGIN_NOTHING)
	{
		(void) rm_rewrite_begin(run);
		return RM_STEP_AGAIN;
	}
	rw = rm_rewrite_next(run, &rel, &result);
	if (rw == NULL)
		return result;
	if (!cut_back(rw))
	{
		table_close(rel, NoLock);
		return rm_rewrite_start_over(run, rw->relid, "the shadow was emptied by a crash");
	}
	end = Min(m->end_block, RelationGetNumberOfBlocks(rel));
	if (m->next_block < end)
		copy_range(run, rw, rel, end);
	table_close(rel, NoLock);
	rm_rewrite_save(rw);

	run->progress.blocks_done = m->next_block;
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = m->rows_done;
	run->progress.rows_total = Max(m->rows_estimated, m->rows_done);
	rm_rewrite_progress(run, rw);
	run->async_commit = true;
	run->may_hold = true;
	run->batch_ended = true;
	run->batches++;
	return m->next_block < end ? RM_STEP_AGAIN : rm_rewrite_table_done(run, rw);
}

static void
copy_committed(RmRun *run, RmStepResult result)
{
	char		rows[32];

	if (result == RM_STEP_BACK || (result == RM_STEP_AGAIN && !rm_notice_due(run)))
		return;
	rm_format_count(rows, sizeof(rows), run->progress.rows_done);
	ereport(NOTICE,
			(errmsg("copy: %s rows, %d %% of %s", rows,
					run->progress.blocks_total == 0 || result == RM_STEP_DONE ? 100 :
					(int) (100 * run->progress.blocks_done / run->progress.blocks_total),
					run->relation)));
}

const RmStep rm_step_rewrite_copy = {
	.name = "copy",
	.throttled = true,
	.writes_pages = true,
	.apply = copy_apply,
	.revert = rm_rewrite_nothing,
	.committed = copy_committed,
};
