/*-------------------------------------------------------------------------
 *
 * pages.h
 *	  A table page by page, past shared_buffers.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_PAGES_H
#define RM_PAGES_H

#include "access/htup_details.h"
#include "storage/buf.h"
#include "storage/bufpage.h"
#include "utils/rel.h"
#include "utils/snapshot.h"

/* one page, pinned, and the rows on it that the snapshot sees */
typedef struct RmPages
{
	Relation	rel;
	Snapshot	snapshot;
	BufferAccessStrategy strategy;
	Buffer		buf;			/* or InvalidBuffer */
	BlockNumber block;
	bool		all_visible;	/* to every snapshot */
	int			nrows;
	OffsetNumber rows[MaxHeapTuplesPerPage];
} RmPages;

/* the row version there */
static inline void
rm_tuple_on_page(Relation rel, Page page, BlockNumber block, OffsetNumber off, HeapTuple tup)
{
	ItemId		lp = PageGetItemId(page, off);

	tup->t_data = (HeapTupleHeader) PageGetItem(page, lp);
	tup->t_len = ItemIdGetLength(lp);
	tup->t_tableOid = RelationGetRelid(rel);
	ItemPointerSet(&tup->t_self, block, off);
}

extern void rm_pages_begin(RmPages *p, Relation rel, Snapshot snapshot);
extern void rm_pages_read(RmPages *p, BlockNumber block);
extern void rm_pages_row(const RmPages *p, int i, HeapTuple tup);
extern void rm_pages_end(RmPages *p);

#endif							/* RM_PAGES_H */
