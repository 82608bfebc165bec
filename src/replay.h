/*-------------------------------------------------------------------------
 *
 * replay.h
 *	  online_rewrite: rows looked up by the key of a table.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_REPLAY_H
#define RM_REPLAY_H

#include "access/genam.h"
#include "access/skey.h"
#include "executor/tuptable.h"
#include "rewrite.h"

typedef struct RmLookup
{
	Relation	rel;
	Relation	index;
	int			nkeys;
	IndexScanDesc scan;
	TupleTableSlot *slot;		/* the row that was found */
	ScanKeyData keys[INDEX_MAX_KEYS];	/* sk_argument: whom to look up */
} RmLookup;

extern RmLookup *rm_lookup_begin(Relation rel, Oid index_oid, Snapshot snapshot);
extern AttrNumber rm_lookup_attnum(RmLookup *l, int i);
extern void rm_lookup_key_of(RmLookup *l, TupleTableSlot *slot);
extern bool rm_lookup(RmLookup *l);
extern void rm_lookup_end(RmLookup *l);

#endif							/* RM_REPLAY_H */
