/*-------------------------------------------------------------------------
 *
 * pages.c
 *	  A table page by page, past shared_buffers.
 *
 * Who reads all of a table once (the copy, the verification, the building of an index)
 * has no use for its pages in shared_buffers, and takes them from those who have.  So
 * each reader has the few buffers of a BAS_BULKREAD ring, however small the table is; a
 * scan of PostgreSQL's has one only if the table is larger than a quarter of
 * shared_buffers.  That is also cheaper: the buffers of a ring stay in the
 * processor's cache, and are mapped in the process once.
 *
 * A row is good until the next page is read.  The pin keeps it where it is: to move or
 * freeze anything on a page one has to be the only one who has it pinned.
 *
 * Predicate locks are not taken: our transactions are READ COMMITTED.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "compat.h"
#include "pages.h"
#include "storage/bufmgr.h"

/* the caller has locked rel, and keeps the snapshot */
void
rm_pages_begin(RmPages *p, Relation rel, Snapshot snapshot)
{
	p->rel = rel;
	p->snapshot = snapshot;
	p->strategy = rm_small_ring();
	p->buf = InvalidBuffer;
	p->nrows = 0;
}

/* which has to be there */
void
rm_pages_read(RmPages *p, BlockNumber block)
{
	Page		page;
	OffsetNumber max;

	if (BufferIsValid(p->buf))
		ReleaseBuffer(p->buf);
	p->buf = ReadBufferExtended(p->rel, MAIN_FORKNUM, block, RBM_NORMAL, p->strategy);
	p->block = block;
	p->nrows = 0;
	LockBuffer(p->buf, BUFFER_LOCK_SHARE);
	page = BufferGetPage(p->buf);
	max = PageGetMaxOffsetNumber(page);
	p->all_visible = PageIsAllVisible(page);
	for (OffsetNumber off = FirstOffsetNumber; off <= max; off = OffsetNumberNext(off))
	{
		HeapTupleData tup;

		if (!ItemIdIsNormal(PageGetItemId(page, off)))
			continue;
		if (!p->all_visible)
		{
			rm_tuple_on_page(p->rel, page, block, off, &tup);
			if (!HeapTupleSatisfiesVisibility(&tup, p->snapshot, p->buf))
				continue;
		}
		p->rows[p->nrows++] = off;
	}
	LockBuffer(p->buf, BUFFER_LOCK_UNLOCK);
}

/* the row of that number on the page */
void
rm_pages_row(const RmPages *p, int i, HeapTuple tup)
{
	rm_tuple_on_page(p->rel, BufferGetPage(p->buf), p->block, p->rows[i], tup);
}

void
rm_pages_end(RmPages *p)
{
	if (BufferIsValid(p->buf))
		ReleaseBuffer(p->buf);
	FreeAccessStrategy(p->strategy);
}
