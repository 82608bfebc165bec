/*-------------------------------------------------------------------------
 *
 * backfill.c
 *	  The step "backfill": the rolling HOT way to fill a new column.
 *
 * An UPDATE of all rows of a page that is full puts every new version on
 * another page and every index gets a new entry for it: that, not the
 * conversion, is what makes a batched UPDATE slow and leaves the table twice
 * as large.  A new version that finds room on its own page is heap-only: no
 * index is touched and little WAL is written.  So room is made first:
 *
 *	A window is a range of pages, visited again and again.  At each visit the
 *	page is pruned (what earlier visits left behind goes, since those have
 *	committed and nobody can see it) and as many rows are converted as now fit
 *	on it.  At its first visit a full page gives some of its rows away to other
 *	pages, just enough that the rest fit in a handful of visits: with old rows
 *	of s bytes, new ones of n, and r = s / n, a page on which k of its rows have
 *	left can convert k*r + k*r*r + ... further ones, at most k*r/(1-r).
 *	They leave in two portions.  Each needs new index entries, and by the time
 *	of the second the entries that the first has left behind are dead: B-trees
 *	drop these instead of splitting their pages.
 *
 *	Transactions end after max_row_lock_time (sooner by what the ends of the
 *	last ones took), at the next page when somebody waits for one of their rows,
 *	and within a batch of at most so many rows, so no other writer waits long
 *	for a row.  They commit without waiting for the disk; at the end of each
 *	batch the WAL is flushed, after the locks are gone.
 *
 *	A window counts as done only when all its rows are: only then next_block
 *	moves, of the state row or, where several processes share the pages out
 *	among them, of the range that the window is in (crew.c).  After a crash the window is looked at again; rows
 *	that are converted already show it by their value.
 *
 *	A row that somebody else has locked is left for the next visit, and, when
 *	nothing else remains in the window, written down in skipped_row.  These
 *	are visited at the end, one to a transaction, with a wait of bounded
 *	length that holds no other row's lock.
 *
 * The way ends: the last page was fixed when the sync trigger was in place.
 * What is written after that, anywhere, the trigger converts.
 *
 * Easy to get wrong:
 *
 *	A snapshot that is older than our last visit keeps pruning from making
 *	room.  A pass over the window in which nothing could be done says so; then
 *	we rest a little, holding nothing, and if that does not help convert the
 *	rest of the window the plain way, wherever there is room.
 *
 *	When a transaction fails, the pages are as they were but our memory of
 *	them is not: everything remembered about a window is thrown away then.
 *
 *	A partitioned table, or one with children, is filled leaf by leaf, each like a
 *	table of its own, with its own last page and its own locked rows; see leaves.c.
 *
 *	Page numbers mean something for one relfilenode only.  After VACUUM FULL,
 *	CLUSTER or TRUNCATE we begin again at page 0.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "crew.h"
#include "executor/spi.h"
#include "leaves.h"
#include "miscadmin.h"
#include "risky_migrations.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "storage/lock.h"
#include "utils/memutils.h"
#include "utils/rel.h"

/* pages of a window: large enough that a pass outlasts other transactions */
#define WINDOW_PAGES 1024
/* visits in which a page is to be done; fewer give more rows away */
#define AIMED_VISITS 14
/* how long to rest in one window for the sake of an old snapshot, in ms */
#define PATIENCE 200
/* the same after a window in which resting did not help */
#define LITTLE_PATIENCE 4
/* rows between two looks at the clock, where they are not slow */
#define CLOCK_EVERY 8
/* passes in a row that find nothing but locked rows before these are put off */
#define LOCK_PASSES 2

/* what is known of one page of the window */
typedef struct PageState
{
	bool		done;			/* nothing is left to do */
	bool		visited;
	uint8		evict_later;	/* rows to give away at the second visit */
	uint16		need;			/* room that the last row there needed */
	Bitmapset  *failed;			/* offsets of rows that do not convert */
} PageState;

/* the window, and the batch it is counted in; lives across transactions */
typedef struct Backfill
{
	Oid			leaf;			/* if there are any: whose window it is */
	int			range;			/* likewise of a range; 0: of no range */
	BlockNumber start;			/* window, [start, end) */
	BlockNumber end;
	PageState	pages[WINDOW_PAGES];
	BlockNumber next;			/* page to visit next in this pass */
	int64		pass_rows;		/* converted in this pass */
	int64		pass_left;		/* left in this pass for want of room */
	int			lock_passes;	/* passes that left nothing but locked rows */
	bool		plain;			/* convert without regard to room */
	bool		careful;		/* a value in this window does not convert */
	bool		converting;		/* the user's expression is being evaluated */
	int			rested_ms;
	int			patience_ms;
	List	   *locked;			/* TIDs found locked in this pass */

	bool		dirty;			/* a transaction is under way, or has failed */
	int64		batch_rows;		/* in the batch, committed */
	int64		xact_rows;
	int64		xact_hot;
	int64		xact_failed;	/* rows that did not convert */
	int64		base_rows;		/* run->rows_changed before the transaction */
	int64		base_hot;
	int64		base_batches;
	bool		batch_complete;
	int64		gathered_failures;	/* of all ranges, in this transaction */
	int64		helpers_rows;	/* of all helpers when the batch began */
	int64		rows_done;		/* copies of the state row's for the notices */
	int64		rows_estimated;
	int64		blocks_done;
	int64		blocks;
	int64		first_block;	/* where this run began */
	instr_time	batch_started;
	instr_time	first_row;		/* of the transaction */
	double		worked_ms;		/* since then, when the work was over */
	double		overhead_ms;	/* from there until the locks are gone */
	int			clock_every;	/* rows between two looks at the clock */
	int64		failures;
	bool		null_on_error;
	bool		nothing_to_do;
} Backfill;

/* adds a copy of tid to the list, in the memory of the step */
static List *
add_tid(RmRun *run, List *tids, ItemPointer tid)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(run->cxt);
	ItemPointer copy = palloc(sizeof(ItemPointerData));

	ItemPointerCopy(tid, copy);
	tids = lappend(tids, copy);
	MemoryContextSwitchTo(oldcxt);
	return tids;
}

/* another pass over the window */
static void
begin_pass(Backfill *b)
{
	b->next = b->start;
	b->pass_rows = 0;
	b->pass_left = 0;
	list_free_deep(b->locked);
	b->locked = NIL;
}

/* a window from start on, of which nothing is known yet */
static void
reset_window(Backfill *b, BlockNumber start, BlockNumber end)
{
	for (int i = 0; i < WINDOW_PAGES; i++)
		bms_free(b->pages[i].failed);
	b->start = start;
	b->end = Min(start + WINDOW_PAGES, end);
	memset(b->pages, 0, sizeof(b->pages));
	b->plain = false;
	b->rested_ms = 0;
	b->lock_passes = 0;
	begin_pass(b);
}

/* rows to give away so that the others fit in AIMED_VISITS visits */
static int
rows_to_evict(int rows, Size old_size, Size new_size)
{
	double		r = Min(1.0, (double) old_size / (double) new_size);
	double		gain = 0;
	double		term = 1;

	for (int i = 0; i < AIMED_VISITS; i++)
	{
		term *= r;
		gain += term;
	}
	return Max(1, (int) ((double) rows / (1 + gain) + 0.999));
}

/*
 * Does anybody wait for a row of this transaction?  The rows bear the id of
 * the subtransaction under way, and whoever wants one of them waits for that.
 */
static bool
somebody_waits(void)
{
	LOCKTAG		tag;

	SET_LOCKTAG_TRANSACTION(tag, GetCurrentTransactionId());
	return LockHasWaiters(&tag, ExclusiveLock, false);
}

/* has the transaction had its rows or its time? */
static bool
transaction_full(RmRun *run)
{
	Backfill   *b = run->work;
	double		limit;

	if (b->batch_rows + b->xact_rows + b->xact_failed >= run->batch)
		return true;
	if (b->xact_rows + b->xact_failed == 0)
		return false;
	/* the commit takes its time too; but some row has to be done */
	limit = Min(rm_max_row_lock_time * 0.8, rm_max_row_lock_time - b->overhead_ms);
	limit = Max(limit, rm_max_row_lock_time * 0.1);
	return rm_elapsed_ms(b->first_row) >= limit;
}

/*
 * The transaction has committed: learn from it.  What its end took (state,
 * log, commit) is believed at once when it was long, and forgotten slowly.
 * Where rows are slow to convert the clock is looked at for each of them.
 */
static void
adapt_to_time(Backfill *b)
{
	double		overhead;

	if (b->xact_rows + b->xact_failed == 0)
		return;
	overhead = rm_elapsed_ms(b->first_row) - b->worked_ms;
	b->overhead_ms = Max(overhead, b->overhead_ms * 0.9 + overhead * 0.1);
	b->clock_every = b->worked_ms / (b->xact_rows + b->xact_failed) * CLOCK_EVERY >
		rm_max_row_lock_time * 0.1 ? 1 : CLOCK_EVERY;
}

/* stores the new version of the row in the slot; false if it is locked */
static bool
store_row(RmRun *run, RmRows *rows, bool *hot)
{
	Backfill   *b = run->work;
	TM_Result	result;

	if (b->xact_rows + b->xact_failed == 0)
		INSTR_TIME_SET_CURRENT(b->first_row);
	result = rm_row_store(rows, false, hot);
	switch (result)
	{
		case TM_Ok:
			b->xact_rows++;
			b->pass_rows++;
			if (*hot)
				b->xact_hot++;
			return true;
		case TM_Updated:
		case TM_Deleted:
			return true;		/* its successor was converted by the trigger */
		default:
			b->locked = add_tid(run, b->locked, &rows->slot->tts_tid);
			return false;
	}
}

/* records that the row in the slot does not convert; not to be tried again */
static void
note_failure(RmRun *run, RmRows *rows, PageState *page, OffsetNumber offset,
			 ErrorData *error)
{
	Backfill   *b = run->work;
	MemoryContext oldcxt;

	if (b->xact_rows + b->xact_failed == 0)
		INSTR_TIME_SET_CURRENT(b->first_row);
	rm_row_record_failure(rows, error);
	b->xact_failed++;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	page->failed = bms_add_member(page->failed, offset);
	MemoryContextSwitchTo(oldcxt);
}

/*
 * Visits one page of the window.  False if the transaction was full before
 * the page was through.
 */
static bool
visit_page(RmRun *run, RmRows *rows, BlockNumber block)
{
	Backfill   *b = run->work;
	PageState  *page = &b->pages[block - b->start];
	OffsetNumber offsets[MaxHeapTuplesPerPage];
	Buffer		buf;
	Size		room;
	int			n;
	int			dead;
	int			stored = 0;
	int			left = 0;
	int			locked = 0;
	int			evict = -1;		/* not yet decided */
	bool		through = true;

	ExecClearTuple(rows->slot); /* its pin would prevent pruning */
	buf = ReadBuffer(rows->rel, block);
	heap_page_prune_opt(rows->rel, buf);
	n = rm_rows_on_page(rows, buf, true, offsets, &dead);
	room = PageGetHeapFreeSpace(BufferGetPage(buf));

	for (int i = 0; i < n; i++)
	{
		Datum		value;
		bool		isnull;
		ErrorData  *error;
		Size		need;
		bool		hot = false;

		if (bms_is_member(offsets[i], page->failed))
			continue;
		/* the clock is looked at every few rows */
		if (b->batch_rows + b->xact_rows + b->xact_failed >= run->batch ||
			(i % b->clock_every == 0 && transaction_full(run)))
		{
			through = false;
			break;
		}
		if (page->need > room && evict <= 0 && !b->plain &&
			(evict == 0 || dead > 0 || (page->visited && page->evict_later == 0 && stored > 0)))
		{
			/* rows of a table are alike: none of the others will fit either */
			left += n - i;
			break;
		}
		rm_row_get(rows, buf, offsets[i]);
		b->converting = true;
		if (!rm_row_convert(rows, b->careful, &value, &isnull, &error))
		{
			b->converting = false;
			note_failure(run, rows, page, offsets[i], error);
			continue;
		}
		b->converting = false;
		if (isnull)
			continue;			/* that is what the column holds */

		need = rm_row_make(rows, value, isnull);
		page->need = Min(need, PG_UINT16_MAX);
		if (need > room && !b->plain)
		{
			if (evict < 0)
			{
				if (dead > 0)
					evict = 0;	/* what is dead will be room at the next visit */
				else if (!page->visited)
				{
					evict = rows_to_evict(n - i,
										  MAXALIGN(((HeapTupleTableSlot *) rows->slot)->tuple->t_len),
										  need);
					page->evict_later = evict / 2;
					evict -= page->evict_later;
				}
				else if (page->evict_later > 0)
				{
					evict = page->evict_later;
					page->evict_later = 0;
				}
				else
					evict = stored > 0 ? 0 : Max(1, (n - i) / 4);
			}
			if (evict == 0)
			{
				/* rows of a table are alike: the others will not fit either */
				left += n - i;
				break;
			}
			evict--;
		}
		if (store_row(run, rows, &hot))
		{
			stored++;
			room -= Min(room, hot ? need : 0);
		}
		else
			locked++;
	}
	ReleaseBuffer(buf);
	if (through)
	{
		page->visited = true;
		page->done = (left == 0 && locked == 0);
		b->pass_left += left;
	}
	return through;
}

/* a notice of how far it is, at most once a second */
static void
notice_progress(RmRun *run)
{
	Backfill   *b = run->work;
	double		ms = rm_elapsed_ms(b->batch_started);
	double		total_ms = rm_elapsed_ms(run->started);
	int64		visited = b->blocks_done - b->first_block;
	int64		left = b->blocks - b->blocks_done;
	char		rows[32];
	char		total[32];
	RmCrewSums	helpers = rm_crew_sums(run);

	rm_format_count(rows, sizeof(rows), b->batch_rows + helpers.rows_changed - b->helpers_rows);
	rm_format_count(total, sizeof(total), left <= 0 ? b->rows_done : Max(b->rows_estimated, b->rows_done));
	ereport(NOTICE,
			(errmsg("batch %lld: %s rows backfilled (%.1f s), %d %% of %s, about %.0f s left",
					(long long) (run->batches + helpers.batches), rows, ms / 1000.0,
					(int) (b->blocks > 0 ? 100 * b->blocks_done / b->blocks : 100),
					total,
					visited > 0 ? total_ms / 1000.0 * left / visited : 0.0)));
}

/* the window is through but for rows that stay locked: write those down */
static void
close_window(RmRun *run, BlockNumber end)
{
	Backfill   *b = run->work;
	ListCell   *lc;

	foreach(lc, b->locked)
	{
		Oid			types[] = {INT8OID, OIDOID, TIDOID};
		Datum		v[] = {Int64GetDatum(run->m->id),
		ObjectIdGetDatum(run->range.relfilenode), PointerGetDatum(lfirst(lc))};

		rm_state_execute("INSERT INTO risky_migrations.skipped_row VALUES ($1, $2, $3)",
						 3, types, v, NULL);
	}
	b->patience_ms = b->plain ? LITTLE_PATIENCE : PATIENCE;
	b->careful = false;
	run->range.next_block = b->end;
	reset_window(b, b->end, end);
}

/* a pass over the window has ended: close it, or how to go on? */
static void
end_pass(RmRun *run, BlockNumber end)
{
	Backfill   *b = run->work;

	if (b->pass_left == 0 &&
		(b->locked == NIL || b->lock_passes++ >= LOCK_PASSES))
	{
		close_window(run, end);
		return;
	}
	if (b->pass_left == 0)
	{
		run->pause_ms = 1;		/* let those who hold the locks go on */
		run->wait_kind = "row lock";
		run->wait_reason = psprintf("%d rows of the window are locked by others",
									list_length(b->locked));
	}
	else if (b->pass_rows == 0)
	{
		/* an old snapshot keeps the dead rows: rest, then do without room */
		if (b->rested_ms >= b->patience_ms)
			b->plain = true;
		else
		{
			run->pause_ms = Max(1, Min(20, b->rested_ms));
			b->rested_ms += run->pause_ms;
			run->wait_kind = "snapshot";
			run->wait_reason = "an old snapshot keeps dead rows of the window";
		}
	}
	begin_pass(b);
}

/* one transaction's worth of the window */
static void
work_on_window(RmRun *run, Relation rel, BlockNumber end)
{
	Backfill   *b = run->work;
	RmRows	   *rows = rm_rows_open(run->m, rel, RM_ROWS_MANY);
	bool		full = false;

	while (b->next < b->end && !full)
	{
		CHECK_FOR_INTERRUPTS();
		if (!b->pages[b->next - b->start].done &&
			!visit_page(run, rows, b->next))
			break;
		b->next++;
		full = transaction_full(run) || (b->xact_rows > 0 && somebody_waits());
	}
	rm_rows_close(rows);
	if (b->next >= b->end)
		end_pass(run, end);
}

/*
 * One of the rows that were locked when the window was closed.  Its version
 * may be gone by now: then the trigger has converted the new one.  True when
 * there are no more.
 */
static bool
visit_skipped_row(RmRun *run, Relation rel)
{
	Backfill   *b = run->work;
	RmMigration *m = run->m;
	Oid			types[] = {INT8OID, OIDOID, TIDOID};
	Datum		v[3];
	ItemPointerData tid;
	RmRows	   *rows;

	v[0] = Int64GetDatum(m->id);
	v[1] = ObjectIdGetDatum(m->relfilenode);
	rm_state_execute("DELETE FROM risky_migrations.skipped_row WHERE ctid ="
					 " (SELECT ctid FROM risky_migrations.skipped_row"
					 "   WHERE migration_id = $1 AND relfilenode = $2"
					 "   ORDER BY row_tid LIMIT 1) RETURNING row_tid",
					 2, types, v, NULL);
	if (SPI_processed == 0)
		return true;
	ItemPointerCopy((ItemPointer) DatumGetPointer(rm_result_datum(0, 1)), &tid);

	rows = rm_rows_open(m, rel, RM_ROWS_ONE);
	if (rm_row_get_tid(rows, &tid))
	{
		bool		isnull;
		Datum		value;
		ErrorData  *error;
		bool		hot = false;

		(void) rm_row_target(rows, &isnull);
		if (!isnull)
			;					/* done meanwhile */
		else if (!rm_row_convert(rows, true, &value, &isnull, &error))
		{
			rm_row_record_failure(rows, error);
			b->xact_failed++;
		}
		else if (!isnull)
		{
			(void) rm_row_make(rows, value, isnull);
			INSTR_TIME_SET_CURRENT(b->first_row);
			if (rm_row_store(rows, true, &hot) == TM_Ok)
			{
				b->xact_rows++;
				b->xact_hot += hot;
			}
		}
	}
	rm_rows_close(rows);
	return false;
}

void
rm_forget_skipped_rows(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("DELETE FROM risky_migrations.skipped_row WHERE migration_id = $1",
					 1, types, v, NULL);
}

/* pages have other numbers now: begin again */
static void
start_over(RmRun *run, Relation rel)
{
	RmMigration *m = run->m;

	ereport(NOTICE,
			(errmsg("table %s has been rewritten or truncated meanwhile, the backfill starts again at its first page",
					OidIsValid(m->leaf) ? rm_relation_sql(m->leaf) : m->relation)));
	rm_forget_skipped_rows(m);
	rm_backfill_fix_end(m, rel);
	m->phase = 0;
}

/* fixes the amount of work: the pages that exist now; the caller saves m */
void
rm_backfill_fix_end(RmMigration *m, Relation rel)
{
	rm_ranges_forget(m);
	m->relfilenode = rel->rd_rel->relfilenode;
	m->next_block = 0;
	m->end_block = RelationGetNumberOfBlocks(rel);
}

/* the memory of the step, as it has to be at the start of a transaction */
static Backfill *
begin_work(RmRun *run)
{
	Backfill   *b = run->work;

	if (b == NULL)
	{
		b = run->work = MemoryContextAllocZero(run->cxt, sizeof(Backfill));
		b->patience_ms = PATIENCE;
		b->null_on_error = run->m->null_on_error;
		INSTR_TIME_SET_CURRENT(b->batch_started);
		b->clock_every = 1;		/* until it is known how long a row takes */
		b->range = -1;			/* of none yet */
		b->first_block = run->m->next_block + rm_ranges_sum(run, true)->blocks_done;
		run->progress.blocks_first = b->first_block;
		run->progress.rows_first = run->m->rows_done + run->range_sums.rows_changed;
	}
	else if (b->dirty)
	{
		/* the last transaction failed: nothing of what it did is true */
		run->rows_changed = b->base_rows;
		run->rows_hot = b->base_hot;
		run->batches = b->base_batches;
		b->range = -1;
	}
	b->dirty = true;
	b->base_rows = run->rows_changed;
	b->base_hot = run->rows_hot;
	b->base_batches = run->batches;
	b->xact_rows = b->xact_hot = b->xact_failed = b->gathered_failures = 0;
	b->batch_complete = false;
	return b;
}

/* for rm_progress; pages of the window count as soon as they are done */
static void
note_progress(RmRun *run)
{
	Backfill   *b = run->work;
	RmMigration *m = run->m;
	int64		done = m->phase == 0 ? m->next_block + run->range_sums.blocks_done : m->end_block;

	if (m->by_leaf && !OidIsValid(m->leaf))
		return;					/* between two leaves */
	for (int i = 0; m->phase == 0 && i < WINDOW_PAGES; i++)
		done += b->pages[i].done;
	run->progress.blocks_done = Min(done, m->end_block);
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = b->rows_done;
	run->progress.rows_total = Max(m->rows_estimated, b->rows_done);
	rm_leaves_progress(run);
	b->blocks_done = m->phase == 0 && m->ranges == 0 ? b->next + run->other_blocks_done :
		run->progress.blocks_done;
	b->blocks = m->end_block + run->other_blocks;
}

/*
 * Before the transaction that ends the step: helpers go, so that what they have
 * done last is counted.  True if some have been there.
 */
static bool
dismiss_helpers(RmRun *run)
{
	run->helpers = 0;
	return run->crew != NULL;
}

/* the books of a transaction, at its end */
static RmStepResult
end_transaction(RmRun *run, RmStepResult result)
{
	RmMigration *m = run->m;
	Backfill   *b = run->work;

	if (run->range.number > 0)
	{
		run->range.rows_changed += b->xact_rows;
		run->range.rows_failed += b->xact_failed;
		if (run->helper == 0)
			rm_range_save(run);
	}
	else
		m->rows_done += b->xact_rows;
	run->rows_changed += b->xact_rows;
	run->rows_hot += b->xact_hot;
	run->async_commit = true;
	b->batch_complete = b->batch_rows + b->xact_rows + b->xact_failed >= run->batch;
	if ((b->batch_complete || result == RM_STEP_DONE) &&
		b->batch_rows + b->xact_rows > 0)
		run->batches++;
	if (run->helper == 0)
	{
		(void) rm_ranges_sum(run, b->next == b->start);
		b->rows_done = m->rows_done + run->range_sums.rows_changed;
		b->rows_estimated = m->rows_estimated;
		note_progress(run);
	}
	if (b->xact_rows + b->xact_failed > 0)
		b->worked_ms = rm_elapsed_ms(b->first_row);
	run->may_hold = true;		/* nothing is held in between */
	run->batch_ended = b->batch_complete;
	return result;
}

/* the window is one of another leaf, or of another range, if only of the same number */
static void
change_range(RmRun *run)
{
	Backfill   *b = run->work;

	if (b->leaf == run->m->leaf && b->range == run->range.number && !run->range.fresh)
		return;
	b->leaf = run->m->leaf;
	b->range = run->range.number;
	reset_window(b, run->range.next_block, run->range.end_block);
}

/* is there another leaf to be filled? */
static RmStepResult
next_leaf(RmRun *run)
{
	RmMigration *m = run->m;

	rm_ranges_forget(m);		/* likewise */
	rm_range_whole(run);
	(void) begin_work(run);
	rm_forget_skipped_rows(m);	/* of a leaf that is none any more */
	m->phase = 0;
	if (rm_leaves_arm(run) || rm_leaves_choose(run))
		return end_transaction(run, RM_STEP_AGAIN);
	if (dismiss_helpers(run))
		return RM_STEP_AGAIN;
	return end_transaction(run, RM_STEP_DONE);
}

/* one transaction's worth of the range under way */
static void
work_on_range(RmRun *run, Relation rel)
{
	Backfill   *b = run->work;
	RmRange    *range = &run->range;
	BlockNumber end = Min(range->end_block, RelationGetNumberOfBlocks(rel));

	change_range(run);
	b->end = Min(b->end, end);
	if (range->next_block < end)
		work_on_window(run, rel, end);
	if (range->next_block >= end)
		range->next_block = range->end_block;
}

/*
 * Shares what is left of the pages out, if it is worth while: then true, and
 * this transaction does no more, so that helpers can begin with the next one.
 */
static bool
share_out(RmRun *run)
{
	RmMigration *m = run->m;
	int			workers = rm_workers_for(m->end_block - m->next_block, WINDOW_PAGES);

	run->helpers = workers - 1;
	if (m->ranges > 0 || workers == 1)
		return false;
	rm_ranges_cut(run, OidIsValid(m->leaf) ? m->leaf : m->relid, workers, WINDOW_PAGES);
	return true;
}

/* all ranges are done: what they have counted is the state row's now */
static void
gather_ranges(RmRun *run)
{
	RmMigration *m = run->m;
	Backfill   *b = run->work;

	m->rows_done += rm_ranges_sum(run, true)->rows_changed;
	b->gathered_failures = run->range_sums.rows_failed;
	m->next_block = m->end_block;
	rm_ranges_forget(m);
	if (!OidIsValid(m->leaf))
		run->helpers = 0;		/* the rest is not for them */
}

/* one transaction's worth of the pages, alone or beside helpers */
static void
work_on_pages(RmRun *run, Relation rel)
{
	RmMigration *m = run->m;

	if (share_out(run))
		return;
	if (m->ranges == 0)
	{
		work_on_range(run, rel);
		m->next_block = run->range.next_block;
		if (m->next_block >= m->end_block)
			m->phase = 1;
		return;
	}
	switch (rm_range_take(run))
	{
		case RM_RANGE_TAKEN:
			work_on_range(run, rel);
			break;
		case RM_RANGE_NONE_FREE:
			rm_range_wait(run);
			break;
		case RM_RANGE_ALL_DONE:
			gather_ranges(run);
			m->phase = 1;
			break;
	}
}

static RmStepResult
backfill_apply(RmRun *run)
{
	RmMigration *m = run->m;
	RmStepResult result = RM_STEP_AGAIN;
	Backfill   *b;
	Relation	rel;

	if (m->by_leaf && !OidIsValid(m->leaf))
		return next_leaf(run);
	rel = rm_leaf_open(run, RowExclusiveLock);
	if (m->ranges == 0)
		rm_range_whole(run);
	b = begin_work(run);
	if (rel == NULL)
		return RM_STEP_AGAIN;
	if (m->relfilenode != rel->rd_rel->relfilenode)
	{
		start_over(run, rel);
		b->first_block = run->progress.blocks_first = 0;
		rm_range_whole(run);
		b->range = -1;
	}

	if (m->phase == 0)
		work_on_pages(run, rel);
	else if (visit_skipped_row(run, rel))
	{
		if (OidIsValid(m->leaf))
			rm_leaf_done(m);
		else if (!dismiss_helpers(run))
			result = RM_STEP_DONE;
	}
	table_close(rel, NoLock);
	return end_transaction(run, result);
}

/*
 * One transaction's worth of a range, in a helper.  Of what has changed
 * meanwhile the runner takes care.
 */
static void
backfill_help(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;

	m->leaf = run->range.relid == m->relid ? InvalidOid : run->range.relid;
	m->relfilenode = run->range.relfilenode;
	rel = rm_leaf_open(run, RowExclusiveLock);
	(void) begin_work(run);
	if (rel == NULL || rel->rd_rel->relfilenode != run->range.relfilenode)
		run->pause_ms = RM_LOOK_AT_OTHERS;
	else
		work_on_range(run, rel);
	if (rel)
		table_close(rel, NoLock);
	(void) end_transaction(run, RM_STEP_AGAIN);
}

static void
backfill_committed(RmRun *run, RmStepResult result)
{
	Backfill   *b = run->work;

	if (run->revert)
		return;
	b->dirty = false;
	adapt_to_time(b);
	b->batch_rows += b->xact_rows;
	b->failures += run->range.number == 0 ? b->xact_failed + b->gathered_failures : 0;
	if (!b->batch_complete && result != RM_STEP_DONE)
		return;

	/* the locks are gone: now the batch may wait for the disk */
	XLogFlush(XactLastCommitEnd);
	if (run->helper == 0 && b->batch_rows > 0 && (rm_notice_due(run) || result == RM_STEP_DONE))
		notice_progress(run);
	b->batch_rows = 0;
	b->helpers_rows = rm_crew_sums(run).rows_changed;
	INSTR_TIME_SET_CURRENT(b->batch_started);
	if (result == RM_STEP_DONE && b->failures > 0)
		ereport(WARNING,
				(errcode(ERRCODE_DATA_EXCEPTION),
				 errmsg_plural("%lld row holds a value that does not convert",
							   "%lld rows hold values that do not convert",
							   (unsigned long) b->failures, (long long) b->failures),
				 b->null_on_error ? errdetail("The new column is NULL there, as on_error => 'null' says; the values are recorded.") :
				 errdetail("That is recorded, and nothing was lost; it stands in the way of the next step."),
				 errhint("SELECT * FROM rm_conversion_errors; mended rows are converted as they are written.")));
}

/* a value that does not convert: the same again, row by row */
static bool
backfill_retry(RmRun *run, ErrorData *error)
{
	Backfill   *b = run->work;

	if (b == NULL || !b->converting || b->careful ||
		!rm_is_conversion_failure(error->sqlerrcode))
		return false;
	b->converting = false;
	b->careful = true;
	return true;
}

const RmStep rm_step_backfill = {
	.name = "backfill",
	.throttled = true,
	.writes_pages = true,
	.apply = backfill_apply,
	.revert = rm_backfill_revert,
	.committed = backfill_committed,
	.retry = backfill_retry,
	.help = backfill_help,
};
