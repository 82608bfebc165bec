/*-------------------------------------------------------------------------
 *
 * replay.h
 *	  online_rewrite: rows looked up by the key of a table, and rounds of replaying.
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
#include "utils/tuplesort.h"

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

/* a round of replaying under way; see rewrite_replay.c */
typedef struct RmRound
{
	RmTransfer *t;
	Relation	log;
	RmLookup   *source;			/* the table, by the snapshot */
	RmLookup   *target;			/* the shadow, as it is */
	Tuplesortstate *keys;		/* rows of the log, by key */
	TupleTableSlot *log_slot;	/* the key under way */
	TupleTableSlot *last_slot;	/* the key before */
	TupleTableSlot *made_slot;	/* a new row */
	TupleTableSlot *key_row;	/* a row of the table that has nothing but the key */
	FmgrInfo	equal[INDEX_MAX_KEYS];
	bool		has_last;
	int64		read;			/* rows of the log */
	/* where rows have changed, in units of RM_CHUNK_PAGES */
	Bitmapset  *shadow_pages;
	Bitmapset  *table_pages;
} RmRound;

extern RmRound *rm_round_begin(RmTransfer *t);
extern void rm_round_end(RmRound *r);
extern bool rm_round_next_key(RmRound *r);
extern void rm_round_source_key(RmRound *r, RmLookup *l);
extern bool rm_round_target_key(RmRound *r, RmLookup *l);
extern void rm_round_insert(RmRound *r, HeapTuple tup);

#endif							/* RM_REPLAY_H */
