/*-------------------------------------------------------------------------
 *
 * rewrite_versions.c
 *	  online_rewrite: rounds that bring over every version of a row.
 *
 * A round as in rewrite_replay.c leaves in the shadow what the table was at its
 * snapshot, written by its own transaction.  That is enough as long as all who
 * will ever look at the shadow have begun after it.  The cut-over waits for
 * those who have not, but not under its lock, and there the last changes have to
 * be brought over.  Whoever took a snapshot after that wait, and comes to the
 * table after the exchange, must find the rows as they were then; not as the
 * last round that its snapshot sees has left them.
 *
 * So these rounds store the versions that each changed row has had since the
 * last round before the wait (the mark), and then give them the xids that the
 * table's versions have: what was made by transaction 1000 and replaced by 1010
 * in the table is so in the shadow.  Whatever snapshot looks, it finds what it
 * would have found in the table.  Versions that VACUUM has removed from the table
 * are needed by nobody, by the very rule by which it could remove them.
 *
 * First the rows are deleted and stored in the ordinary way, with index entries
 * and TOASTed values, by this transaction; then their xids are exchanged for the
 * right ones, page by page (restamp()), also those of the pieces of TOASTed values.  An abort does not undo that: it leaves
 * the log as it was and the shadow ahead of it.  So a version that the shadow
 * has already, told by key and xmin, is not stored again, and an ordinary round
 * deletes whatever it finds under a key.  What is lost in an abort or a crash
 * before restamp() are versions of an aborted transaction, which nobody sees.
 *
 * Which transactions may be under way: writers, beside whom the round goes (then
 * it takes what its snapshot sees as committed, the rest stays in the log) or for
 * whom it has waited (under ACCESS EXCLUSIVE).
 *
 * Easy to get wrong:
 *
 *	Hint bits of these rows say nothing yet; whether their transactions have
 *	committed is looked up as for any row.  They had, before this one's snapshot,
 *	and this one's commit comes after theirs in the WAL.
 *
 *	A version that was frozen since the mark cannot be told from one of an earlier
 *	epoch.  And of a snapshot whose list of subtransactions has overflowed one
 *	cannot tell later who was in progress.  Then everybody is waited for once more,
 *	with a new mark.
 *
 *	A version that does not convert, though its successor does, cannot be had: as
 *	before.
 *
 *	VACUUM looks at a table and at its TOAST table one after the other, and not only
 *	VACUUM cleans pages: a version may still be there whose TOASTed values have gone.
 *	It is one that has been removed.
 *
 *	To VACUUM the shadow is a table as any other, and it does not know that there will be
 *	xids in it that are older than it is: those that are older than the relfrozenxid
 *	it may have set since the mark cannot be had.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "access/genam.h"
#include "access/generic_xlog.h"
#include "access/heapam.h"
#include "access/heaptoast.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/toast_internals.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/index.h"
#include "compat.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "replay.h"
#include "rewrite.h"
#include "storage/bufmgr.h"
#include "storage/bufpage.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* the xids that a row of the shadow is to have; InvalidTransactionId: as it has */
typedef struct Stamp
{
	ItemPointerData tid;
	TransactionId xmin;
	TransactionId xmax;
} Stamp;

typedef struct StampList
{
	Stamp	   *stamps;
	int			n;
	int			max;
} StampList;

/* a version of a row, that somebody may see or have seen */
typedef struct Version
{
	ItemPointerData tid;
	TransactionId xmin;
	TransactionId xmax;			/* of who has replaced or deleted it, or 0 */
	bool		since;			/* made since the mark */
} Version;

/* those with one key, in the table or in the shadow */
typedef struct VersionList
{
	RmLookup   *lookup;
	Version    *versions;
	int			n;
	int			max;
} VersionList;

typedef struct Versions
{
	RmRound    *r;
	const RmMark *mark;
	VersionList table;
	VersionList shadow;
	TupleTableSlot *slot;		/* a row of the table */
	MemoryContext cxt;
	StampList	stamps;
	Version		under_way[RM_TRANSFER_ROWS];	/* those of t->rows */
	bool		lost;			/* something cannot be told */
} Versions;

/*-------------------------------------------------------------------------
 * The mark
 *-------------------------------------------------------------------------
 */

static TransactionId *
copy_xids(const TransactionId *xids, int n)
{
	TransactionId *copy = palloc(sizeof(TransactionId) * Max(n, 1));

	if (n > 0)
		memcpy(copy, xids, sizeof(TransactionId) * n);
	return copy;
}

/*
 * Of a round in this transaction, with that snapshot; in cxt.  NULL if the snapshot
 * does not tell enough later.
 */
RmMark *
rm_mark_of(Snapshot snapshot, MemoryContext cxt)
{
	MemoryContext oldcxt;
	RmMark	   *mark;

	if (snapshot->suboverflowed)
		return NULL;
	oldcxt = MemoryContextSwitchTo(cxt);
	mark = palloc0(sizeof(RmMark));
	mark->xid = GetCurrentTransactionId();
	mark->snapshot.snapshot_type = SNAPSHOT_MVCC;
	mark->snapshot.xmin = snapshot->xmin;
	mark->snapshot.xmax = snapshot->xmax;
	mark->snapshot.xcnt = snapshot->xcnt;
	mark->snapshot.subxcnt = snapshot->subxcnt;
	mark->snapshot.xip = copy_xids(snapshot->xip, snapshot->xcnt);
	mark->snapshot.subxip = copy_xids(snapshot->subxip, snapshot->subxcnt);
	MemoryContextSwitchTo(oldcxt);
	return mark;
}

/* was that transaction, which has committed, not seen by the marked round? */
static bool
is_since(const RmMark *mark, TransactionId xid)
{
	return TransactionIdIsNormal(xid) && xid != mark->xid &&
		XidInMVCCSnapshot(xid, (Snapshot) &mark->snapshot);
}

/* is what that transaction has done there, as the snapshot sees it? */
static bool
is_done(TransactionId xid, Snapshot snapshot)
{
	return !TransactionIdIsCurrentTransactionId(xid) &&
		!XidInMVCCSnapshot(xid, snapshot) && TransactionIdDidCommit(xid);
}

/*-------------------------------------------------------------------------
 * Versions
 *-------------------------------------------------------------------------
 */

/*
 * The version that a look-up has found; false if it is none, as of the snapshot.
 * *frozen tells that its xmin may be of any epoch.
 */
static bool
read_version(TupleTableSlot *slot, Snapshot snapshot, Version *version, bool *frozen)
{
	Buffer		buf = ((BufferHeapTupleTableSlot *) slot)->buffer;
	HeapTupleHeader tup = ((HeapTupleTableSlot *) slot)->tuple->t_data;
	TransactionId xmax = InvalidTransactionId;
	bool		aborted;

	/* xmax and what it means may change */
	LockBuffer(buf, BUFFER_LOCK_SHARE);
	version->xmin = HeapTupleHeaderGetRawXmin(tup);
	*frozen = HeapTupleHeaderXminFrozen(tup);
	aborted = !*frozen && HeapTupleHeaderXminInvalid(tup);
	if (!(tup->t_infomask & HEAP_XMAX_INVALID) && !HEAP_XMAX_IS_LOCKED_ONLY(tup->t_infomask))
		xmax = HeapTupleHeaderGetUpdateXid(tup);
	LockBuffer(buf, BUFFER_LOCK_UNLOCK);

	version->tid = slot->tts_tid;
	version->xmax = TransactionIdIsValid(xmax) && is_done(xmax, snapshot) ? xmax : InvalidTransactionId;
	return !aborted && (*frozen || is_done(version->xmin, snapshot));
}

/* all versions with the key that stands in the look-up */
static void
read_versions(Versions *v, VersionList *list)
{
	RmLookup   *l = list->lookup;

	list->n = 0;
	index_rescan(l->scan, l->keys, l->nkeys, NULL, 0);
	while (index_getnext_slot(l->scan, ForwardScanDirection, l->slot))
	{
		Version		version;
		bool		frozen;

		CHECK_FOR_INTERRUPTS();
		if (!read_version(l->slot, v->r->t->snapshot, &version, &frozen))
			continue;
		version.since = is_since(v->mark, version.xmin);
		if (version.since && frozen)
		{
			/* of the shadow's none is younger than the copy */
			v->lost |= list == &v->table;
			version.since = false;
		}
		if (list->n == list->max)
		{
			list->max = Max(64, list->max * 2);
			list->versions = list->versions ?
				repalloc(list->versions, sizeof(Version) * list->max) :
				MemoryContextAlloc(v->cxt, sizeof(Version) * list->max);
		}
		list->versions[list->n++] = version;
	}
}

/* of the key under way, in table and shadow */
static void
read_key(Versions *v)
{
	MemoryContextReset(v->r->t->row_cxt);
	rm_round_source_key(v->r, v->table.lookup);
	read_versions(v, &v->table);
	if (rm_round_target_key(v->r, v->shadow.lookup))
		read_versions(v, &v->shadow);
	else
		v->shadow.n = 0;
}

/* does the shadow have a version made by xmin, and ended by xmax, or not yet? */
static bool
is_there(Versions *v, TransactionId xmin, TransactionId xmax, bool not_yet)
{
	for (int i = 0; i < v->shadow.n; i++)
	{
		Version    *s = &v->shadow.versions[i];

		if (s->since && s->xmin == xmin &&
			(s->xmax == xmax || (not_yet && !TransactionIdIsValid(s->xmax))))
			return true;
	}
	return false;
}

/*
 * When did the version of the shadow, which has not ended there, end in the table?
 * Of what VACUUM has removed from there nobody's snapshot can tell: the mark's own
 * transaction, or that which made it, is as good as any.
 */
static TransactionId
end_of(Versions *v, const Version *s)
{
	TransactionId xmax = s->since ? s->xmin : v->mark->xid;

	for (int i = 0; i < v->table.n; i++)
	{
		Version    *t = &v->table.versions[i];

		if (t->since != s->since || t->xmin == t->xmax)
			continue;
		if (s->since)
		{
			/* a transaction may have made several, by savepoints */
			if (t->xmin != s->xmin ||
				(TransactionIdIsValid(t->xmax) && is_there(v, t->xmin, t->xmax, false)))
				continue;
		}
		else if (TransactionIdIsValid(t->xmax) && !is_since(v->mark, t->xmax))
			continue;			/* the mark did not see it any more */
		xmax = t->xmax;
	}
	return xmax;
}

/*-------------------------------------------------------------------------
 * Xids
 *-------------------------------------------------------------------------
 */

static void
note_stamp(StampList *list, ItemPointer tid, TransactionId xmin, TransactionId xmax)
{
	if (list->n == list->max)
	{
		list->max = Max(256, list->max * 2);
		list->stamps = list->stamps ?
			repalloc_huge(list->stamps, sizeof(Stamp) * list->max) :
			palloc(sizeof(Stamp) * list->max);
	}
	list->stamps[list->n++] = (Stamp) {.tid = *tid,.xmin = xmin,.xmax = xmax};
}

static int
compare_stamps(const void *a, const void *b)
{
	return ItemPointerCompare(&((Stamp *) a)->tid, &((Stamp *) b)->tid);
}

static void
stamp(Page page, const Stamp *s, bool xmin, bool xmax)
{
	ItemId		lp = PageGetItemId(page, ItemPointerGetOffsetNumber(&s->tid));
	HeapTupleHeader tup = (HeapTupleHeader) PageGetItem(page, lp);

	if (xmin && TransactionIdIsValid(s->xmin))
	{
		tup->t_infomask &= ~HEAP_XMIN_FROZEN;	/* both hints */
		HeapTupleHeaderSetXmin(tup, s->xmin);
		HeapTupleHeaderSetCmin(tup, FirstCommandId);
	}
	if (xmax && TransactionIdIsValid(s->xmax))
	{
		tup->t_infomask &= ~HEAP_XMAX_BITS;
		HeapTupleHeaderSetXmax(tup, s->xmax);
		HeapTupleHeaderSetCmax(tup, FirstCommandId, false);
	}
}

/* page by page */
static void
stamp_all(Relation rel, StampList *list, bool xmin, bool xmax)
{
	int			i = 0;

	qsort(list->stamps, list->n, sizeof(Stamp), compare_stamps);
	while (i < list->n)
	{
		BlockNumber block = ItemPointerGetBlockNumber(&list->stamps[i].tid);
		Buffer		buf = ReadBuffer(rel, block);
		GenericXLogState *state;
		Page		page;

		LockBuffer(buf, BUFFER_LOCK_EXCLUSIVE);
		state = GenericXLogStart(rel);
		page = GenericXLogRegisterBuffer(state, buf, 0);
		for (; i < list->n && ItemPointerGetBlockNumber(&list->stamps[i].tid) == block; i++)
			stamp(page, &list->stamps[i], xmin, xmax);
		GenericXLogFinish(state);
		UnlockReleaseBuffer(buf);
	}
}

/* the pieces of a TOASTed value get the xids of its row */
static void
note_pieces(StampList *list, Relation toast, Relation index, Oid value, const Stamp *row)
{
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tup;

	ScanKeyInit(&key, 1, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(value));
	scan = systable_beginscan_ordered(toast, index, SnapshotAny, 1, &key);
	while ((tup = systable_getnext_ordered(scan, ForwardScanDirection)) != NULL)
		note_stamp(list, &tup->t_self, row->xmin, row->xmax);
	systable_endscan_ordered(scan);
}

/* the pieces of all TOASTed values of the rows */
static StampList
pieces(Versions *v, Relation toast)
{
	Relation	shadow = v->r->t->shadow;
	Relation	index = index_open(toast_get_valid_index(RelationGetRelid(toast), RowExclusiveLock),
								   RowExclusiveLock);
	TupleTableSlot *slot = table_slot_create(shadow, NULL);
	StampList	list = {0};

	for (int i = 0; i < v->stamps.n; i++)
	{
		Stamp	   *row = &v->stamps.stamps[i];

		if (!table_tuple_fetch_row_version(shadow, &row->tid, SnapshotAny, slot))
			elog(ERROR, "a version of a row has gone from the shadow");
		if (!HeapTupleHasExternal(((HeapTupleTableSlot *) slot)->tuple))
			continue;
		slot_getallattrs(slot);
		for (int a = 0; a < slot->tts_tupleDescriptor->natts; a++)
		{
			struct varatt_external pointer;
			struct varlena *value = (struct varlena *) DatumGetPointer(slot->tts_values[a]);

			if (slot->tts_isnull[a] ||
				TupleDescAttr(slot->tts_tupleDescriptor, a)->attlen != -1 ||
				!VARATT_IS_EXTERNAL_ONDISK(value))
				continue;
			VARATT_EXTERNAL_GET_POINTER(pointer, value);
			note_pieces(&list, toast, index, pointer.va_valueid, row);
		}
	}
	ExecDropSingleTupleTableSlot(slot);
	index_close(index, NoLock);
	return list;
}

/* may the table have all these xids, none of which VACUUM has declared to be gone from it? */
static bool
may_have(Relation rel, const StampList *list)
{
	TransactionId frozen = rel->rd_rel->relfrozenxid;

	for (int i = 0; i < list->n; i++)
		if ((TransactionIdIsValid(list->stamps[i].xmin) &&
			 TransactionIdPrecedes(list->stamps[i].xmin, frozen)) ||
			(TransactionIdIsValid(list->stamps[i].xmax) &&
			 TransactionIdPrecedes(list->stamps[i].xmax, frozen)))
			return false;
	return true;
}

/*
 * See the top of the file.  What a crash leaves in between may be pieces of TOASTed
 * values that belong to nobody; but no row without its pieces.  False, and nothing is
 * done, if these xids cannot be had.
 */
static bool
restamp(Versions *v)
{
	Relation	shadow = v->r->t->shadow;
	Relation	toast;
	StampList	list;
	bool		possible = may_have(shadow, &v->stamps);

	if (!possible || !OidIsValid(shadow->rd_rel->reltoastrelid))
	{
		if (possible)
			stamp_all(shadow, &v->stamps, true, true);
		return possible;
	}
	toast = table_open(shadow->rd_rel->reltoastrelid, RowExclusiveLock);
	list = pieces(v, toast);
	possible = may_have(toast, &list);
	if (possible)
	{
		stamp_all(toast, &list, true, false);
		stamp_all(shadow, &v->stamps, true, true);
		stamp_all(toast, &list, false, true);
	}
	table_close(toast, NoLock);
	return possible;
}

/*-------------------------------------------------------------------------
 * A round
 *-------------------------------------------------------------------------
 */

/* what the shadow has of the key ends as it did in the table */
static void
end_versions(Versions *v)
{
	read_key(v);
	for (int i = 0; i < v->shadow.n; i++)
	{
		Version    *s = &v->shadow.versions[i];
		TransactionId xmax;

		if (TransactionIdIsValid(s->xmax))
			continue;
		xmax = end_of(v, s);
		if (!TransactionIdIsValid(xmax))
			continue;
		simple_heap_delete(v->r->t->shadow, &s->tid);
		note_stamp(&v->stamps, &s->tid, InvalidTransactionId, xmax);
	}
}

/* stores one that is over: whoever sees it does so by an old snapshot */
static void
store_old_version(Versions *v, HeapTuple tup, const Version *version)
{
	RmRound    *r = v->r;
	RmTransfer *t = r->t;
	ItemPointerData tid;

	ExecStoreHeapTuple(tup, r->made_slot, false);
	table_tuple_insert(t->shadow, r->made_slot, GetCurrentCommandId(true), 0, NULL);
	tid = r->made_slot->tts_tid;
	/* it stands in nobody's way, nor anybody in its */
	for (int i = 0; i < t->rri->ri_NumIndices; i++)
	{
		Relation	index = t->rri->ri_IndexRelationDescs[i];
		IndexInfo  *info = t->rri->ri_IndexRelationInfo[i];
		ExprContext *econtext = GetPerTupleExprContext(t->estate);
		Datum		values[INDEX_MAX_KEYS];
		bool		isnull[INDEX_MAX_KEYS];

		econtext->ecxt_scantuple = r->made_slot;
		if (info->ii_Predicate != NIL)
		{
			if (info->ii_PredicateState == NULL)
				info->ii_PredicateState = ExecPrepareQual(info->ii_Predicate, t->estate);
			if (!ExecQual(info->ii_PredicateState, econtext))
				continue;
		}
		FormIndexDatum(info, r->made_slot, t->estate, values, isnull);
		index_insert(index, values, isnull, &tid, t->shadow, UNIQUE_CHECK_NO, false, info);
	}
	ResetPerTupleExprContext(t->estate);
	CommandCounterIncrement();
	simple_heap_delete(t->shadow, &tid);
	note_stamp(&v->stamps, &tid, version->xmin, version->xmax);
}

/* makes and stores the versions under way */
static void
store_versions(Versions *v)
{
	RmTransfer *t = v->r->t;

	rm_transfer_make(t);
	for (int i = 0; i < t->nrows; i++)
	{
		const Version *version = &v->under_way[i];

		if (t->made[i] == NULL)
		{
			if (TransactionIdIsValid(version->xmax))
				v->lost = true;
			else
				rm_log_key(v->r->log, t->rows[i]);
		}
		else if (TransactionIdIsValid(version->xmax))
			store_old_version(v, t->made[i], version);
		else
		{
			rm_round_insert(v->r, t->made[i]);
			note_stamp(&v->stamps, &v->r->made_slot->tts_tid, version->xmin, InvalidTransactionId);
		}
	}
	ExecClearTuple(v->r->made_slot);
	rm_transfer_clear(t);
}

/* one version, and what becomes of it */
typedef struct Flatten
{
	RmTransfer *t;
	HeapTuple	tup;
	HeapTuple	flat;			/* in t->made_cxt */
} Flatten;

static void
flatten(void *arg)
{
	Flatten    *f = arg;
	MemoryContext oldcxt = MemoryContextSwitchTo(f->t->made_cxt);

	f->flat = toast_flatten_tuple(f->tup, RelationGetDescr(f->t->rel));
	MemoryContextSwitchTo(oldcxt);
}

/*
 * A version that is over, with its TOASTed values, which are looked up now.  NULL if
 * they have gone: then nobody can have a snapshot that sees the version.
 */
static HeapTuple
flatten_old_version(Versions *v, HeapTuple tup)
{
	Flatten		f = {.t = v->r->t,.tup = tup};
	ErrorData  *error = rm_try(flatten, &f, f.t->made_cxt);

	/* what the TOAST table does not have, or not all of it */
	if (error && error->sqlerrcode != ERRCODE_DATA_CORRUPTED)
		ReThrowError(error);
	return f.flat;
}

/* the version in v->slot comes among those under way */
static void
add_version(Versions *v, const Version *version)
{
	RmTransfer *t = v->r->t;
	BufferHeapTupleTableSlot *slot = (BufferHeapTupleTableSlot *) v->slot;
	HeapTuple	tup = slot->base.tuple;
	Buffer		buf = slot->buffer;

	if (rm_transfer_is_full(t))
		store_versions(v);
	if (TransactionIdIsValid(version->xmax) && HeapTupleHasExternal(tup))
	{
		tup = flatten_old_version(v, tup);
		if (tup == NULL)
			return;
		buf = InvalidBuffer;
	}
	(void) rm_transfer_add(t, tup, buf);
	v->under_way[t->nrows - 1] = *version;
}

/* all versions since the mark that the shadow does not have */
static void
add_versions(Versions *v)
{
	RmTransfer *t = v->r->t;

	read_key(v);
	for (int i = 0; i < v->table.n; i++)
	{
		Version    *version = &v->table.versions[i];

		/* one that its own transaction has ended is seen by nobody */
		if (!version->since || version->xmin == version->xmax ||
			is_there(v, version->xmin, version->xmax, true))
			continue;
		if (!table_tuple_fetch_row_version(t->rel, &version->tid, SnapshotAny, v->slot))
			continue;			/* VACUUM has just removed it */
		add_version(v, version);
	}
}

/* does the shadow have a row for the key where the table has one, and only there? */
static bool
is_as_it_should_be(RmRound *r)
{
	bool		is;
	bool		should;

	MemoryContextReset(r->t->row_cxt);
	rm_round_source_key(r, r->source);
	should = rm_lookup(r->source);
	is = rm_round_target_key(r, r->target) && rm_lookup(r->target);
	return is == should && (!is || !index_getnext_slot(r->target->scan, ForwardScanDirection, r->target->slot));
}

/*
 * A round since that mark, in the transaction under way; rel is locked.  Afterwards
 * the shadow has what the table has, for every snapshot after the mark.  False if
 * that could not be done: the transaction must not commit, and a new mark is
 * needed.  What does not convert is recorded and its key logged again.
 */
bool
rm_replay_versions(RmRun *run, RmRewrite *rw, Relation rel, const RmMark *mark)
{
	RmTransfer *t = rm_transfer_begin(run->m, rw, rel, ShareUpdateExclusiveLock, true);
	Versions	v = {.r = rm_round_begin(t),.mark = mark,.cxt = CurrentMemoryContext};

	v.table.lookup = rm_lookup_begin(rel, rw->key_index, SnapshotAny);
	v.shadow.lookup = rm_lookup_begin(t->shadow, rm_rewrite_shadow_key(rw), SnapshotAny);
	v.slot = table_slot_create(rel, NULL);
	while (rm_round_next_key(v.r))
		end_versions(&v);
	/* what has ended is in nobody's way */
	CommandCounterIncrement();
	while (rm_round_next_key(v.r))
		add_versions(&v);
	store_versions(&v);
	CommandCounterIncrement();
	while (t->failed == 0 && !v.lost && rm_round_next_key(v.r))
		v.lost = !is_as_it_should_be(v.r);
	if (!v.lost)
		v.lost = !restamp(&v);
	rw->rows_failed = t->failed;
	run->rows_changed += v.r->read - t->failed;
	ExecDropSingleTupleTableSlot(v.slot);
	rm_lookup_end(v.table.lookup);
	rm_lookup_end(v.shadow.lookup);
	rm_round_end(v.r);
	rm_transfer_end(t);
	return !v.lost;
}
