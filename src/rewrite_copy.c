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
 * Several processes may copy, each of them disjoint ranges of the table (crew.c).
 * Each appends chunks of RM_CHUNK_PAGES, which it has filled in its memory, so that
 * the lock on the extension of the shadow is held for as long as it takes to hand
 * them to the operating system.
 *
 * Frozen rows do not go away with the transaction that stored them.  So a page of
 * the shadow is good only if it is in a chunk, a row of rewrite_chunk that was
 * written in the same transaction; all others are what a transaction has left that
 * failed, or was killed at whatever point.  Nobody reads the shadow before the copy
 * is complete.  Then, when nobody copies any more, the runner cuts off what is no
 * good at the end, and empties the rest of it.  (A process that goes on after a
 * failure uses its own pages once more, and a run begins by cutting off the end, so
 * there is not much of it.)
 *
 * A chunk says also which rows of the table it was made of, all those between two
 * places: with that the verification reads both side by side.  Where only one process
 * copies, a helper does that already, some pages behind it (rewrite_verify.c), as long as
 * that takes no processor from anybody.
 *
 * The pages are written past the buffers, before they are logged: a page that a
 * crash leaves without its record is in no chunk either, and what comes to the disk
 * for a checkpoint has been written before the record that the checkpoint skips.
 * The visibility map is written at the end, whole pages of it.
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
 *	Pages that somebody may have read, since they are in the file, are in buffers
 *	too, and must be changed there.  Only what is behind the end of the file is not.
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
#include "catalog/pg_type.h"
#include "catalog/storage.h"
#include "compat.h"
#include "crew.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pages.h"
#include "rewrite.h"
#include "rows.h"
#include "risky_migrations.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "storage/bufpage.h"
#include "storage/freespace.h"
#include "storage/lmgr.h"
#include "storage/smgr.h"
#include "throttle.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* how long one transaction copies, milliseconds, and pages, at most */
#define COPY_TIME 250
#define COPY_PAGES 16384
/* chunks of one transaction; with so many it is time to commit */
#define COPY_CHUNKS 512

/* pages of the visibility map, see visibilitymap.c */
#define MAP_SIZE (BLCKSZ - MAXALIGN(SizeOfPageHeaderData))
#define BLOCKS_PER_MAP_BYTE (BITS_PER_BYTE / BITS_PER_HEAPBLOCK)
#define BLOCKS_PER_MAP_PAGE (MAP_SIZE * BLOCKS_PER_MAP_BYTE)

typedef struct Chunk
{
	BlockNumber first;			/* pages of the shadow */
	int			npages;
	int64		first_row;		/* places in the table: from here */
	int64		end_row;		/* to before there */
} Chunk;

/* copying; lives across transactions */
typedef struct CopyWork
{
	char	   *pages;			/* RM_CHUNK_PAGES, under construction */
	Oid			shadow;			/* to which the rest belongs */
	/* what the last transaction has written */
	int			nwritten;
	Chunk		written[COPY_CHUNKS];
	/* pages of this process from transactions that failed */
	List	   *spare;			/* of Chunk * */
	BlockNumber offered;		/* to helpers, up to there */
} CopyWork;

/* pages of the shadow under construction */
typedef struct PageWriter
{
	Relation	rel;
	CopyWork   *work;
	int			npages;			/* begun, the last one has room yet */
	Size		keep_free;		/* fillfactor */
	int64		first_row;		/* of the table, that has gone into these pages */
} PageWriter;

/*-------------------------------------------------------------------------
 * Chunks
 *-------------------------------------------------------------------------
 */

/* nothing is known of the shadow's pages */
void
rm_chunks_forget(Oid shadow)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(shadow)};

	rm_state_execute("DELETE FROM risky_migrations.rewrite_chunk WHERE shadow = $1",
					 1, types, v, NULL);
}

/* pages of the shadow up to the end of the last chunk */
BlockNumber
rm_chunks_end(Oid shadow)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(shadow)};

	rm_state_execute("SELECT max(end_block) FROM risky_migrations.rewrite_chunk WHERE shadow = $1",
					 1, types, v, NULL);
	return (BlockNumber) rm_result_int64(0, 1);
}

/* pages of the shadow's chunks that are not verified yet */
int64
rm_chunks_unverified(Oid shadow)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(shadow)};

	rm_state_execute("SELECT coalesce(sum(end_block - first_block), 0)::bigint"
					 " FROM risky_migrations.rewrite_chunk WHERE shadow = $1 AND rows_verified IS NULL",
					 1, types, v, NULL);
	return rm_result_int64(0, 1);
}

static bool
is_chunk(Oid shadow, BlockNumber first)
{
	Oid			types[] = {OIDOID, INT8OID};
	Datum		v[] = {ObjectIdGetDatum(shadow), Int64GetDatum(first)};

	rm_state_execute("SELECT FROM risky_migrations.rewrite_chunk WHERE shadow = $1 AND first_block = $2",
					 2, types, v, NULL);
	return SPI_processed > 0;
}

/* none of them is verified any more */
void
rm_chunks_unverify(Oid shadow)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(shadow)};

	rm_state_execute("UPDATE risky_migrations.rewrite_chunk SET rows_verified = NULL"
					 " WHERE shadow = $1 AND rows_verified IS NOT NULL", 1, types, v, NULL);
}

/* is one of the members from lo to hi in the set? */
static bool
any_between(const Bitmapset *set, int64 lo, int64 hi)
{
	int			next = bms_next_member(set, (int) lo - 1);

	return next >= 0 && next <= hi;
}

/*
 * Rows have changed on these pages of the shadow, and of the table, counted in units
 * of RM_CHUNK_PAGES: the chunks that have them are not verified any more.
 */
void
rm_chunks_changed(Oid shadow, const Bitmapset *pages, const Bitmapset *rows)
{
	Oid			types[] = {OIDOID, INT8ARRAYOID};
	Datum		v[] = {ObjectIdGetDatum(shadow), (Datum) 0};
	Datum	   *changed;
	int			nchanged = 0;
	uint64		n;

	if (bms_is_empty(pages) && bms_is_empty(rows))
		return;
	rm_state_execute("SELECT first_block, end_block - 1, first_row >> 16, (end_row - 1) >> 16"
					 " FROM risky_migrations.rewrite_chunk WHERE shadow = $1 AND rows_verified IS NOT NULL",
					 1, types, v, NULL);
	n = SPI_processed;
	if (n == 0)
		return;
	changed = palloc(sizeof(Datum) * n);
	for (uint64 i = 0; i < n; i++)
		if (any_between(pages, rm_result_int64(i, 1) / RM_CHUNK_PAGES, rm_result_int64(i, 2) / RM_CHUNK_PAGES) ||
			any_between(rows, rm_result_int64(i, 3) / RM_CHUNK_PAGES, rm_result_int64(i, 4) / RM_CHUNK_PAGES))
			changed[nchanged++] = Int64GetDatum(rm_result_int64(i, 1));
	if (nchanged == 0)
		return;
	v[1] = rm_int64_array(changed, nchanged);
	rm_state_execute("UPDATE risky_migrations.rewrite_chunk SET rows_verified = NULL"
					 " WHERE shadow = $1 AND first_block = ANY ($2)", lengthof(types), types, v, NULL);
}

/* makes good what this transaction has written */
static void
save_chunks(const CopyWork *work)
{
	Oid			types[] = {OIDOID, INT8ARRAYOID, INT8ARRAYOID, INT8ARRAYOID, INT8ARRAYOID};
	Datum		v[lengthof(types)];
	Datum	   *fields = palloc(sizeof(Datum) * Max(work->nwritten, 1));

	if (work->nwritten == 0)
		return;
	v[0] = ObjectIdGetDatum(work->shadow);
	for (int field = 1; field < lengthof(types); field++)
	{
		for (int i = 0; i < work->nwritten; i++)
		{
			const Chunk *c = &work->written[i];

			fields[i] = Int64GetDatum(field == 1 ? c->first : field == 2 ? c->first + c->npages :
									  field == 3 ? c->first_row : c->end_row);
		}
		v[field] = rm_int64_array(fields, work->nwritten);
	}
	rm_state_execute("INSERT INTO risky_migrations.rewrite_chunk"
					 " SELECT $1, u.* FROM unnest($2, $3, $4, $5) u",
					 lengthof(types), types, v, NULL);
	pfree(fields);
}

/* at the start of a transaction: whatever the last one has left behind is spare */
static CopyWork *
begin_work(RmRun *run, const RmRewrite *rw)
{
	CopyWork   *work = run->work;
	bool		failed;
	MemoryContext oldcxt;

	if (work == NULL)
	{
		work = run->work = MemoryContextAllocZero(run->cxt, sizeof(CopyWork));
		/* as direct I/O wants it, where it is in use */
		work->pages = (char *) TYPEALIGN(4096, MemoryContextAlloc(run->cxt, RM_CHUNK_PAGES * BLCKSZ + 4096));
	}
	if (work->shadow != rw->shadow)
	{
		work->spare = NIL;
		work->nwritten = 0;
		work->shadow = rw->shadow;
		work->offered = rm_chunks_end(rw->shadow);
	}
	/* all of it was committed, or nothing */
	failed = work->nwritten > 0 && !is_chunk(work->shadow, work->written[0].first);
	oldcxt = MemoryContextSwitchTo(run->cxt);
	for (int i = 0; failed && i < work->nwritten; i++)
	{
		Chunk	   *c = palloc(sizeof(Chunk));

		*c = work->written[i];
		work->spare = lappend(work->spare, c);
	}
	work->nwritten = 0;
	MemoryContextSwitchTo(oldcxt);
	return work;
}

/*-------------------------------------------------------------------------
 * Pages
 *-------------------------------------------------------------------------
 */

static void
writer_begin(PageWriter *w, Relation rel, CopyWork *work, int64 first_row)
{
	w->rel = rel;
	w->work = work;
	w->npages = 0;
	w->keep_free = RelationGetTargetPageFreeSpace(rel, HEAP_DEFAULT_FILLFACTOR);
	w->first_row = first_row;
}

static Page
writer_page(PageWriter *w, int i)
{
	return (Page) (w->work->pages + (Size) i * BLCKSZ);
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

/* puts one page, or an empty one, where there is one already */
static void
overwrite_page(Relation rel, BlockNumber block, Page page)
{
	Buffer		buf = ReadBufferExtended(rel, MAIN_FORKNUM, block, RBM_ZERO_AND_LOCK, NULL);

	START_CRIT_SECTION();
	if (page)
		memcpy(BufferGetPage(buf), page, BLCKSZ);
	else
	{
		PageInit(BufferGetPage(buf), BLCKSZ, 0);
		PageSetAllVisible(BufferGetPage(buf));
	}
	MarkBufferDirty(buf);
	if (RelationNeedsWAL(rel))
		log_newpage_buffer(buf, true);
	END_CRIT_SECTION();
	UnlockReleaseBuffer(buf);
}

/* puts the pages where a transaction of ours has failed; false if they do not fit */
static bool
use_spare(PageWriter *w, Chunk *chunk)
{
	ListCell   *lc;

	foreach(lc, w->work->spare)
	{
		Chunk	   *spare = lfirst(lc);

		if (spare->npages < w->npages)
			continue;
		chunk->first = spare->first;
		chunk->npages = w->npages;
		spare->first += w->npages;
		spare->npages -= w->npages;
		w->work->nwritten++;
		for (int i = 0; i < w->npages; i++)
		{
			set_places(writer_page(w, i), chunk->first + i);
			overwrite_page(w->rel, chunk->first + i, writer_page(w, i));
		}
		return true;
	}
	return false;
}

/*
 * Whoever has this lock hands pages to the operating system, and waits for nobody:
 * not to have it in time, where the disk is slow, is no reason to do all again.
 */
static void
lock_extension(Relation rel)
{
	int			save_nestlevel = NewGUCNestLevel();

	(void) set_config_option("lock_timeout", "0", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	LockRelationForExtension(rel, ExclusiveLock);
	AtEOXact_GUC(false, save_nestlevel);
}

/* appends the pages to the shadow */
static void
append_pages(PageWriter *w, Chunk *chunk)
{
	SMgrRelation smgr = RelationGetSmgr(w->rel);
	BlockNumber blocks[RM_CHUNK_PAGES];
	Page		pages[RM_CHUNK_PAGES];

	lock_extension(w->rel);
	chunk->first = smgrnblocks(smgr, MAIN_FORKNUM);
	if (chunk->first > MaxBlockNumber - w->npages)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("the shadow table cannot have more than %u pages", MaxBlockNumber)));
	/* the disk may be full before the last page */
	chunk->npages = 0;
	w->work->nwritten++;
	for (int i = 0; i < w->npages; i++)
	{
		blocks[i] = chunk->first + i;
		pages[i] = writer_page(w, i);
		set_places(pages[i], blocks[i]);
		PageSetChecksumInplace(pages[i], blocks[i]);
		smgrextend(smgr, MAIN_FORKNUM, blocks[i], (char *) pages[i], false);
		chunk->npages = i + 1;
	}
	UnlockRelationForExtension(w->rel, ExclusiveLock);
	if (RelationNeedsWAL(w->rel))
	{
		rm_log_new_pages(w->rel, w->npages, blocks, pages);
		rm_throttle_look_at_wal();
	}
}

/* the pages, made of the rows of the table before that place, become a chunk */
static void
writer_flush(PageWriter *w, int64 end_row)
{
	Chunk	   *chunk = &w->work->written[w->work->nwritten];

	if (w->npages == 0)
		return;
	chunk->first_row = w->first_row;
	chunk->end_row = end_row;
	if (!use_spare(w, chunk))
		append_pages(w, chunk);
	w->first_row = end_row;
	w->npages = 0;
}

/* is it time to commit? */
static bool
writer_full(const PageWriter *w)
{
	/* a page of the table may become several of the shadow, but not so many */
	return w->work->nwritten >= COPY_CHUNKS / 2;
}

/* adds a row, frozen, from that place of the table; large values go into the TOAST table */
static void
writer_add(PageWriter *w, HeapTuple tup, ItemPointer from)
{
	HeapTupleHeader header;
	Size		len;
	Page		page;

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
	page = w->npages > 0 ? writer_page(w, w->npages - 1) : NULL;
	if (page && len + w->keep_free > PageGetHeapFreeSpace(page))
	{
		if (w->npages == RM_CHUNK_PAGES)
			writer_flush(w, RM_ROW_PLACE(ItemPointerGetBlockNumber(from), ItemPointerGetOffsetNumber(from)));
		page = NULL;
	}
	if (page == NULL)
	{
		page = writer_page(w, w->npages++);
		PageInit(page, BLCKSZ, 0);
		PageSetAllVisible(page);
	}
	if (PageAddItem(page, (Item) header, tup->t_len, InvalidOffsetNumber, false, true) ==
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

/* makes and appends the rows under way; returns how many could be made */
static int
copy_rows(RmTransfer *t, PageWriter *w, Relation log)
{
	int			copied = 0;

	rm_transfer_make(t);
	for (int i = 0; i < t->nrows; i++)
		if (t->made[i])
		{
			writer_add(w, t->made[i], &t->rows[i]->tts_tid);
			copied++;
		}
		else
			rm_log_key(log, t->rows[i]);
	rm_transfer_clear(t);
	return copied;
}

/* the page of the table that has been read; returns the rows that were copied */
static int
copy_page(RmTransfer *t, PageWriter *w, Relation log, const RmPages *pages)
{
	int			copied = 0;

	for (int i = 0; i < pages->nrows; i++)
	{
		HeapTupleData tup;
		Verdict		verdict;

		rm_pages_row(pages, i, &tup);
		verdict = judge(t->rw, tup.t_data);
		if (verdict == LOGGED)
			continue;
		if (!rm_transfer_add(t, &tup, pages->buf))
		{
			copied += copy_rows(t, w, log);
			(void) rm_transfer_add(t, &tup, pages->buf);
		}
		if (verdict == UNKNOWN)
			rm_log_key(log, t->rows[--t->nrows]);
	}
	return copied + copy_rows(t, w, log);
}

/*-------------------------------------------------------------------------
 * The step
 *-------------------------------------------------------------------------
 */

/* cuts off what failed transactions have left at the end of the shadow */
static void
cut_off(Relation shadow, BlockNumber good)
{
	if (RelationGetNumberOfBlocks(shadow) <= good)
		return;
	LockRelation(shadow, AccessExclusiveLock);
	RelationTruncate(shadow, good);
}

/* empties what they have left in between; then all pages are in chunks */
static void
empty_gaps(Relation shadow)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(RelationGetRelid(shadow))};
	uint64		n;

	rm_state_execute("INSERT INTO risky_migrations.rewrite_chunk"
					 " SELECT $1, before, first_block, 0, 0 FROM"
					 " (SELECT lag(end_block, 1, 0::bigint) OVER (ORDER BY first_block) AS before, first_block"
					 "  FROM risky_migrations.rewrite_chunk WHERE shadow = $1) c"
					 " WHERE before < first_block RETURNING first_block, end_block",
					 1, types, v, NULL);
	n = SPI_processed;
	for (uint64 i = 0; i < n; i++)
	{
		BlockNumber first = (BlockNumber) rm_result_int64(i, 1);
		BlockNumber end = (BlockNumber) rm_result_int64(i, 2);

		for (BlockNumber block = first; block < end; block++)
		{
			CHECK_FOR_INTERRUPTS();
			overwrite_page(shadow, block, NULL);
			RecordPageWithFreeSpace(shadow, block, BLCKSZ - SizeOfPageHeaderData - sizeof(ItemIdData));
		}
		FreeSpaceMapVacuumRange(shadow, first, end);
	}
}

/* all rows on all pages are frozen: the visibility map is told, page by page */
static void
set_all_frozen(Relation shadow, BlockNumber blocks)
{
	Buffer		buf = InvalidBuffer;

	for (int64 first = 0; first < blocks; first += BLOCKS_PER_MAP_PAGE)
	{
		int			n = (int) Min(BLOCKS_PER_MAP_PAGE, blocks - first);
		uint8	   *map;

		CHECK_FOR_INTERRUPTS();
		visibilitymap_pin(shadow, (BlockNumber) first, &buf);
		LockBuffer(buf, BUFFER_LOCK_EXCLUSIVE);
		map = (uint8 *) PageGetContents(BufferGetPage(buf));
		START_CRIT_SECTION();
		memset(map, 0xFF, n / BLOCKS_PER_MAP_BYTE);
		if (n % BLOCKS_PER_MAP_BYTE > 0)
			map[n / BLOCKS_PER_MAP_BYTE] |= (1 << (n % BLOCKS_PER_MAP_BYTE * BITS_PER_HEAPBLOCK)) - 1;
		MarkBufferDirty(buf);
		if (RelationNeedsWAL(shadow))
			log_newpage_buffer(buf, false);
		END_CRIT_SECTION();
		LockBuffer(buf, BUFFER_LOCK_UNLOCK);
	}
	if (BufferIsValid(buf))
		ReleaseBuffer(buf);
}

/*
 * All rows have been copied, and nobody copies any more: nothing that is no good
 * is left in the shadow.
 */
static void
clean_shadow(const RmRewrite *rw)
{
	Relation	shadow = table_open(rw->shadow, ShareUpdateExclusiveLock);
	BlockNumber good = rm_chunks_end(rw->shadow);

	cut_off(shadow, good);
	empty_gaps(shadow);
	set_all_frozen(shadow, good);
	table_close(shadow, NoLock);
}

/* at the start of a run */
static void
cut_off_rest(const RmRewrite *rw)
{
	Relation	shadow = table_open(rw->shadow, ShareUpdateExclusiveLock);

	cut_off(shadow, rm_chunks_end(rw->shadow));
	table_close(shadow, NoLock);
}

/* an unlogged table, and with it the shadow, is empty after a crash */
static bool
lacks_pages(const RmRewrite *rw)
{
	/* in this order, since others append beside us */
	BlockNumber good = rm_chunks_end(rw->shadow);
	Relation	shadow = table_open(rw->shadow, AccessShareLock);
	bool		result = RelationGetNumberOfBlocks(shadow) < good;

	table_close(shadow, NoLock);
	return result;
}

/* one transaction's worth of the range under way; returns the rows that were copied */
static int64
copy_range(RmRun *run, RmRewrite *rw, Relation rel)
{
	RmMigration *m = run->m;
	RmRange    *range = &run->range;
	CopyWork   *work = begin_work(run, rw);
	RmTransfer *t = rm_transfer_begin(m, rw, rel, RowExclusiveLock, false);
	Relation	log = table_open(rw->log, RowExclusiveLock);
	BlockNumber end = Min(range->end_block, RelationGetNumberOfBlocks(rel));
	BlockNumber block = range->next_block;
	BlockNumber stop = Min((int64) end, range->next_block + COPY_PAGES);
	RmPages		pages;
	PageWriter	w;
	int64		copied = 0;
	instr_time	started;

	rm_pages_begin(&pages, rel, t->snapshot);
	writer_begin(&w, t->shadow, work, RM_PAGE_PLACE(block));
	INSTR_TIME_SET_CURRENT(started);
	while (block < stop && copied < run->batch && !writer_full(&w))
	{
		CHECK_FOR_INTERRUPTS();
		rm_pages_read(&pages, block++);
		copied += copy_page(t, &w, log, &pages);
		if (block % 64 == 0 && rm_elapsed_ms(started) > COPY_TIME)
			break;
	}
	writer_flush(&w, RM_PAGE_PLACE(block));
	rm_pages_end(&pages);
	table_close(log, NoLock);
	rm_transfer_end(t);
	save_chunks(work);
	range->next_block = block >= end ? range->end_block : block;
	run->rows_changed += copied;
	run->batches++;
	run->async_commit = true;
	run->may_hold = true;
	run->batch_ended = true;
	return copied;
}

/*
 * What this transaction has appended may be verified by a helper as soon as it is committed.
 * What is not given to one here, since it is not much or the transaction fails, is left
 * for the next step.
 */
static void
offer_pages(RmRun *run, const RmRewrite *rw)
{
	CopyWork   *work = run->work;
	const Chunk *last;
	int64		end;

	if (run->helpers == 0 || work->nwritten == 0)
		return;
	last = &work->written[work->nwritten - 1];
	end = (int64) last->first + last->npages;
	if (rm_rewrite_verifiers(end - work->offered) == 0)
		return;
	rm_ranges_offer(run, rw->relid, work->offered, end, RM_REWRITE_RANGE_PAGES);
	work->offered = (BlockNumber) end;
}

/* one transaction's worth of the pages, alone or beside helpers */
static void
copy_pages(RmRun *run, RmRewrite *rw, Relation rel)
{
	RmMigration *m = run->m;
	CopyWork   *work = run->work;
	int			workers = rm_workers_for(m->end_block - m->next_block, RM_REWRITE_RANGE_PAGES);

	run->helpers = workers - 1;
	run->aside = false;
	if (m->ranges == 0)
	{
		if (work == NULL || work->shadow != rw->shadow)
		{
			/* nobody is at work on this shadow, nor of an earlier run any more */
			rm_ranges_forget(m);
			cut_off_rest(rw);
			(void) begin_work(run, rw);
			return;
		}
		if (workers > 1)
		{
			/* no more in this transaction: helpers can begin with the next one */
			rm_ranges_cut(run, rw->relid, workers, RM_REWRITE_RANGE_UNIT);
			return;
		}
		/* where a processor has nothing to do it can verify */
		run->aside = true;
		if (!run->busy)
			run->helpers = rm_rewrite_verifiers(m->end_block);
		rm_range_whole(run);
		m->rows_done += copy_range(run, rw, rel);
		m->next_block = run->range.next_block;
		offer_pages(run, rw);
		return;
	}
	switch (rm_range_take(run))
	{
		case RM_RANGE_TAKEN:
			run->range.rows_changed += copy_range(run, rw, rel);
			rm_range_save(run);
			break;
		case RM_RANGE_NONE_FREE:
			/* a new run that has just made the ranges its own */
			if (work == NULL)
			{
				cut_off_rest(rw);
				(void) begin_work(run, rw);
			}
			rm_range_wait(run);
			break;
		case RM_RANGE_ALL_DONE:
			m->rows_done += rm_ranges_sum(run, true)->rows_changed;
			m->next_block = m->end_block;
			rm_ranges_forget(m);
			break;
	}
}

static RmStepResult
copy_apply(RmRun *run)
{
	RmMigration *m = run->m;
	RmRewrite  *rw;
	Relation	rel;
	RmStepResult result;
	bool		done;

	if (m->phase != RM_BEGIN_NOTHING)
	{
		(void) rm_rewrite_begin(run);
		return RM_STEP_AGAIN;
	}
	rw = rm_rewrite_next(run, &rel, &result);
	if (rw == NULL)
	{
		run->helpers = 0;
		return result;
	}
	if (lacks_pages(rw))
	{
		table_close(rel, NoLock);
		return rm_rewrite_start_over(run, rw->relid, "the shadow was emptied by a crash");
	}
	done = m->next_block >= m->end_block;
	if (done)
	{
		rm_ranges_forget(m);
		clean_shadow(rw);
	}
	else
		copy_pages(run, rw, rel);
	table_close(rel, NoLock);
	/* they have gone when the next transaction begins */
	if (m->next_block >= m->end_block)
		run->helpers = 0;
	(void) rm_ranges_sum(run, false);
	run->progress.blocks_done = m->next_block + run->range_sums.blocks_done;
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = m->rows_done + run->range_sums.rows_changed;
	run->progress.rows_total = Max(m->rows_estimated, run->progress.rows_done);
	rm_rewrite_progress(run, rw);
	return done ? rm_rewrite_table_done(run, rw) : RM_STEP_AGAIN;
}

/* one transaction's worth of a range, in a helper */
static void
copy_help(RmRun *run)
{
	Relation	rel;
	RmRewrite  *rw;

	if (run->aside)
	{
		rm_verify_beside(run);
		return;
	}
	rw = rm_rewrite_help(run, &rel);
	if (rw == NULL)
		return;
	run->range.rows_changed += copy_range(run, rw, rel);
	table_close(rel, NoLock);
}

static void
copy_committed(RmRun *run, RmStepResult result)
{
	char		rows[32];

	if (run->helper > 0 || run->revert || result == RM_STEP_BACK)
		return;
	/* that it is complete is told when it is done, and nothing of the preparations */
	if (result == RM_STEP_AGAIN &&
		(run->progress.blocks_done == 0 || run->progress.blocks_done >= run->progress.blocks_total || !rm_notice_due(run)))
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
	.help = copy_help,
};
