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
 * lie in the order of the table's: the chunks in which they were copied (see
 * rewrite_copy.c) say which pages of the shadow were made of which rows of the
 * table.  So both are read chunk by chunk, in that order, side by side: as long as the
 * next row of the shadow is what the next row of the table becomes, nothing has to
 * be looked up.  Where it is not (one of the two was changed, and lies somewhere
 * else) the row is looked up by its key, and the reading of the shadow goes on
 * behind it if that is near.
 *
 * A row of the shadow that was passed over on the way has the key of a row of the
 * table, which is or was looked up, or it is in the log; else it is one too many.
 * Where the key itself is converted, so that the table's key cannot be told from
 * the shadow's, the rows are counted instead: those of the table, after a round
 * and with its snapshot.
 *
 * Most of it is done before, while one process copies and while the indexes are built: the
 * runner is busy with that, and helpers compare the chunks as they were copied
 * (rm_verify_beside).  They have no index yet to look anything up, so a chunk counts only if
 * its rows are, one after the other, what those of the table become, and no row is left over
 * on either side.  A round of catching up that changes a row in it, of the shadow or of the table,
 * takes that back (rm_chunks_changed).  So what is verified already when the step
 * begins is still so, and what is not is compared now: on a quiet table that is nothing,
 * on a busy one it may be all.  So the statistics of the shadow, which are gathered beside
 * those helpers, are gathered at the end of this step where there were none.
 *
 * For what is in no chunk (pages that table and shadow have got since, pages of which no
 * row was copied) chunks are made up when the verification begins, of some pages of
 * either.  Then each row of the table as of now is in just one chunk, and so is each
 * of the shadow.  It does not matter for the result which rows of the two are in a
 * chunk together.  A chunk is done in one transaction or not at all, and several processes
 * work on chunks side by side (crew.c): what is cut into ranges here are the pages of
 * the shadow, with some behind its end that do not exist for chunks that have none,
 * and a chunk is in the range in which it begins.
 *
 * Easy to get wrong: rows of the table that come on pages behind those that it has
 * when the verification begins need not be looked at.  They are in the log.
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
#include "catalog/pg_type.h"
#include "compat.h"
#include "crew.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "leaves.h"
#include "miscadmin.h"
#include "pages.h"
#include "replay.h"
#include "risky_migrations.h"
#include "rewrite.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "throttle.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* how long one transaction compares, milliseconds; when nobody is to wait for it */
#define VERIFY_TIME 250
#define VERIFY_TIME_BESIDE 100
/* chunks that are looked up at once */
#define MANY_CHUNKS 64
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
	VERIFY_COUNT,
	VERIFY_ANALYZE				/* if nobody has done that yet */
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

/* are they, byte for byte, without TOAST?  That is so of most rows, and soon seen */
static bool
same_bytes(HeapTuple a, HeapTuple b)
{
	HeapTupleHeader x = a->t_data;
	HeapTupleHeader y = b->t_data;

	return a->t_len == b->t_len && x->t_hoff == y->t_hoff &&
		HeapTupleHeaderGetNatts(x) == HeapTupleHeaderGetNatts(y) &&
		((x->t_infomask ^ y->t_infomask) & HEAP_HASNULL) == 0 &&
		memcmp((char *) x + SizeofHeapTupleHeader, (char *) y + SizeofHeapTupleHeader,
			   a->t_len - SizeofHeapTupleHeader) == 0;
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

/* see risky_migrations.rewrite_chunk */
typedef struct Chunk
{
	int64		first_block;
	int64		end_block;
	int64		first_row;
	int64		end_row;
} Chunk;

/* one transaction of verifying */
typedef struct Verify
{
	RmTransfer *t;
	bool		in_order;		/* nothing is looked up: what differs does */
	bool		differs;
	RmLookup   *shadow;			/* by key */
	RmLookup   *source;			/* the table, by key */
	bool		key_converts;	/* the column is part of the key */
	TupleTableSlot *made_slot;	/* what a row should be */
	/* the table's rows that belong to the chunk, and their place in the order of its pages */
	RmPages		rows;
	BlockNumber rel_blocks;
	/* the next row of the shadow's pages that belong to the chunk, in their order */
	RmPages		pages;
	int			next_row;		/* the one behind it, on the page that was read */
	BlockNumber end_block;
	BlockNumber shadow_blocks;
	HeapTupleData next_tuple;
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

/* what a snapshot does not see any more is not to be taken for what is not there */
static void
read_page(RmPages *pages, BlockNumber block)
{
	rm_pages_read(pages, block);
	rm_test_for_old_snapshot(pages->snapshot, pages->rel, BufferGetPage(pages->buf));
}

/* the row behind the next one becomes the next one */
static void
read_on(Verify *v)
{
	while (!v->at_end && v->next_row >= v->pages.nrows)
	{
		if (v->pages.block + 1 >= v->end_block)
			v->at_end = true;
		else
			read_page(&v->pages, v->pages.block + 1);
		v->next_row = 0;
	}
	if (v->at_end)
	{
		ExecClearTuple(v->next);
		return;
	}
	rm_pages_row(&v->pages, v->next_row++, &v->next_tuple);
	ExecStoreHeapTuple(&v->next_tuple, v->next, false);
}

/* of the rows on these pages the first becomes the next one */
static void
read_from(Verify *v, const Chunk *c)
{
	v->end_block = (BlockNumber) Min(c->end_block, v->shadow_blocks);
	v->at_end = c->first_block >= v->end_block;
	v->astray = 0;
	ExecClearTuple(v->next);
	if (v->at_end)
		return;
	read_page(&v->pages, (BlockNumber) c->first_block);
	v->next_row = 0;
	read_on(v);
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

/* to the end of the chunk's pages */
static void
pass_over_rest(Verify *v)
{
	if (v->in_order && !v->at_end)
		v->differs = true;
	while (!v->at_end && !v->differs)
	{
		CHECK_FOR_INTERRUPTS();
		check_passed_over(v);
		read_on(v);
	}
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

	if (v->at_end || found >= v->end_block || ItemPointerCompare(tid, &v->next->tts_tid) < 0)
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
		if (!v->at_end &&
			(same_bytes(t->made[i], &v->next_tuple) ||
			 same_row(desc, v->made_slot, v->next)))
		{
			read_on(v);
			v->astray = 0;
			return;
		}
		if (v->in_order)
		{
			v->differs = true;
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
	if (v->in_order)
		v->differs = true;
	else
		suspect(v, t->rows[i], false);
}

static int
verify_rows(Verify *v)
{
	RmTransfer *t = v->t;
	int			n = t->nrows;

	rm_transfer_make(t);
	for (int i = 0; i < n && !v->differs; i++)
		verify_row(v, i);
	ExecClearTuple(v->made_slot);
	rm_transfer_clear(t);
	return n;
}

static Verify *
verify_begin(RmRewrite *rw, RmTransfer *t, bool in_order)
{
	Verify	   *v = palloc0(sizeof(Verify));

	v->t = t;
	v->in_order = in_order;
	v->shadow_blocks = RelationGetNumberOfBlocks(t->shadow);
	v->rel_blocks = RelationGetNumberOfBlocks(t->rel);
	v->made_slot = MakeSingleTupleTableSlot(RelationGetDescr(t->shadow), &TTSOpsHeapTuple);
	v->next = MakeSingleTupleTableSlot(RelationGetDescr(t->shadow), &TTSOpsHeapTuple);
	rm_pages_begin(&v->pages, t->shadow, t->snapshot);
	rm_pages_begin(&v->rows, t->rel, t->snapshot);
	if (in_order)
		return v;
	v->shadow = rm_lookup_begin(t->shadow, rm_rewrite_shadow_key(rw), t->snapshot);
	v->source = rm_lookup_begin(t->rel, rw->key_index, t->snapshot);
	for (int i = 0; i < v->source->nkeys; i++)
		fmgr_info_copy(&v->compare[i], index_getprocinfo(v->source->index, i + 1, BTORDER_PROC),
					   CurrentMemoryContext);
	v->key_converts = rm_rewrite_key_converts(rw);
	v->suspects_cxt = AllocSetContextCreate(CurrentMemoryContext, "rm suspects", ALLOCSET_DEFAULT_SIZES);
	return v;
}

static void
verify_end(Verify *v)
{
	judge_suspects(v);
	ExecDropSingleTupleTableSlot(v->next);
	ExecDropSingleTupleTableSlot(v->made_slot);
	rm_pages_end(&v->pages);
	rm_pages_end(&v->rows);
	if (!v->in_order)
	{
		rm_lookup_end(v->shadow);
		rm_lookup_end(v->source);
		MemoryContextDelete(v->suspects_cxt);
	}
	if (v->suspects)
		pfree(v->suspects);
	pfree(v);
}

/*-------------------------------------------------------------------------
 * The step
 *-------------------------------------------------------------------------
 */

/* all rows of a chunk, of both sides; returns how many of the table there were */
static int64
verify_chunk(Verify *v, const Chunk *c)
{
	RmTransfer *t = v->t;
	int64		checked = 0;

	v->differs = false;
	read_from(v, c);
	for (int64 block = c->first_row >> 16;
		 RM_PAGE_PLACE(block) < c->end_row && block < v->rel_blocks && !v->differs; block++)
	{
		CHECK_FOR_INTERRUPTS();
		read_page(&v->rows, (BlockNumber) block);
		for (int i = 0; i < v->rows.nrows && !v->differs; i++)
		{
			int64		place = RM_ROW_PLACE(block, v->rows.rows[i]);
			HeapTupleData tup;

			if (place < c->first_row || place >= c->end_row)
				continue;
			rm_pages_row(&v->rows, i, &tup);
			if (rm_transfer_add(t, &tup, v->rows.buf))
				continue;
			checked += verify_rows(v);
			(void) rm_transfer_add(t, &tup, v->rows.buf);
		}
	}
	checked += verify_rows(v);
	pass_over_rest(v);
	return checked;
}

/*
 * The next chunks of the range that are not verified yet; returns how many there are,
 * at most MANY_CHUNKS.
 */
static int
next_chunks(const RmRewrite *rw, const RmRange *range, Chunk *chunks)
{
	Oid			types[] = {OIDOID, INT8OID, INT8OID, INT8OID};
	Datum		v[] = {ObjectIdGetDatum(rw->shadow), Int64GetDatum(range->next_block),
	Int64GetDatum(range->end_block), Int64GetDatum(MANY_CHUNKS)};
	int			n;

	rm_state_execute("SELECT first_block, end_block, first_row, end_row"
					 " FROM risky_migrations.rewrite_chunk WHERE shadow = $1"
					 " AND first_block >= $2 AND first_block < $3 AND rows_verified IS NULL ORDER BY first_block LIMIT $4",
					 lengthof(types), types, v, NULL);
	n = (int) SPI_processed;
	for (int i = 0; i < n; i++)
	{
		chunks[i].first_block = rm_result_int64(i, 1);
		chunks[i].end_block = rm_result_int64(i, 2);
		chunks[i].first_row = rm_result_int64(i, 3);
		chunks[i].end_row = rm_result_int64(i, 4);
	}
	return n;
}

/* these chunks, of so many rows each (-1: not), are what they should be */
static void
save_verified(Oid shadow, const Chunk *chunks, const int64 *rows, int n)
{
	Oid			types[] = {OIDOID, INT8ARRAYOID, INT8ARRAYOID};
	Datum		first[MANY_CHUNKS];
	Datum		count[MANY_CHUNKS];
	Datum		v[] = {ObjectIdGetDatum(shadow), (Datum) 0, (Datum) 0};
	int			good = 0;

	for (int i = 0; i < n; i++)
		if (rows[i] >= 0)
		{
			first[good] = Int64GetDatum(chunks[i].first_block);
			count[good++] = Int64GetDatum(rows[i]);
		}
	if (good == 0)
		return;
	v[1] = rm_int64_array(first, good);
	v[2] = rm_int64_array(count, good);
	rm_state_execute("UPDATE risky_migrations.rewrite_chunk c SET rows_verified = u.n"
					 " FROM unnest($2, $3) u(first_block, n)"
					 " WHERE c.shadow = $1 AND c.first_block = u.first_block",
					 lengthof(types), types, v, NULL);
}

/*
 * One transaction's worth of the range under way; returns the rows that were compared.
 *
 * in_order: by the order of the rows alone, and what differs is left for later
 */
static int64
verify_range(RmRun *run, RmRewrite *rw, Relation rel, bool in_order)
{
	RmRange    *range = &run->range;
	Chunk		chunks[MANY_CHUNKS];
	int			n = next_chunks(rw, range, chunks);
	RmTransfer *t = rm_transfer_begin(run->m, rw, rel, AccessShareLock, false);
	Verify	   *v = verify_begin(rw, t, in_order);
	instr_time	started;
	int64		rows[MANY_CHUNKS];
	int64		checked = 0;
	int			i = 0;

	INSTR_TIME_SET_CURRENT(started);
	while (i < n && (i == 0 || rm_elapsed_ms(started) < (in_order ? VERIFY_TIME_BESIDE : VERIFY_TIME)))
	{
		rows[i] = verify_chunk(v, &chunks[i]);
		checked += rows[i];
		if (v->differs)
			rows[i] = -1;
		i++;
		if (run->aside && rm_throttle_aside_unwanted(run))
			break;
	}
	range->next_block = i < n || n == MANY_CHUNKS ? chunks[i - 1].end_block : range->end_block;
	verify_end(v);
	rm_transfer_end(t);
	if (in_order)
		save_verified(rw->shadow, chunks, rows, i);
	run->async_commit = true;	/* nothing but how far it is */
	run->may_hold = true;
	return checked;
}

/*
 * Fixes what is to be verified, and makes up chunks for what is in none.  The shadow's
 * pages behind the last one that was copied go together with rows of the table
 * that were not.
 */
static void
begin_verification(RmMigration *m, RmRewrite *rw, Relation rel)
{
	Oid			types[] = {OIDOID, INT8OID, INT8OID, INT8OID};
	Relation	shadow = table_open(rw->shadow, AccessShareLock);
	Datum		v[] = {ObjectIdGetDatum(rw->shadow), Int64GetDatum(RelationGetNumberOfBlocks(shadow)),
	Int64GetDatum(RM_PAGE_PLACE(RelationGetNumberOfBlocks(rel))), Int64GetDatum(RM_CHUNK_PAGES)};

	table_close(shadow, NoLock);
	rm_backfill_fix_end(m, rel);
	if (!rm_rewrite_by_leaf(m))
		m->rows_done = 0;
	rm_state_execute("DELETE FROM risky_migrations.rewrite_chunk WHERE shadow = $1 AND NOT copied",
					 1, types, v, NULL);
	rm_state_execute("WITH chunk AS (SELECT * FROM risky_migrations.rewrite_chunk WHERE shadow = $1),"
					 " behind AS (SELECT coalesce(max(end_block), 0) AS block FROM chunk),"
					 " gap AS (SELECT end_row AS first_row, lead(first_row, 1, $3) OVER (ORDER BY first_row, end_row) AS end_row"
					 "  FROM (SELECT first_row, end_row FROM chunk WHERE first_row < end_row"
					 "   UNION ALL SELECT 0, 0) c),"
					 " rows AS (SELECT pg_catalog.row_number() OVER (ORDER BY r) AS n, r AS first_row,"
					 "  least(r + ($4 << 16), gap.end_row, $3) AS end_row"
					 "  FROM gap, pg_catalog.generate_series(gap.first_row, least(gap.end_row, $3) - 1, $4 << 16) r),"
					 " pages AS (SELECT pg_catalog.row_number() OVER (ORDER BY b) AS n"
					 "  FROM behind, pg_catalog.generate_series(behind.block, $2 - 1, $4) b)"
					 " INSERT INTO risky_migrations.rewrite_chunk"
					 " SELECT $1, block + $4 * (n - 1), block + $4 * n,"
					 "  coalesce(first_row, 0), coalesce(end_row, 0), false"
					 " FROM behind, rows FULL JOIN pages USING (n)",
					 lengthof(types), types, v, NULL);
	rm_state_execute("SELECT coalesce(max(end_block), 0), coalesce(sum(rows_verified), 0)::bigint"
					 " FROM risky_migrations.rewrite_chunk WHERE shadow = $1",
					 1, types, v, NULL);
	m->end_block = rm_result_int64(0, 1);
	m->rows_done += rm_result_int64(0, 2);
}

/* one transaction's worth of the chunks, alone or beside helpers */
static void
verify_chunks(RmRun *run, RmRewrite *rw, Relation rel)
{
	RmMigration *m = run->m;
	int			workers = rm_workers_for(m->end_block - m->next_block, RM_REWRITE_RANGE_PAGES);

	run->helpers = workers - 1;
	if (m->ranges == 0 && workers > 1)
	{
		/* no more in this transaction: helpers can begin with the next one */
		rm_ranges_cut(run, rw->relid, workers, RM_REWRITE_RANGE_UNIT);
		return;
	}
	if (m->ranges == 0)
	{
		rm_range_whole(run);
		m->rows_done += verify_range(run, rw, rel, false);
		m->next_block = run->range.next_block;
		return;
	}
	switch (rm_range_take(run))
	{
		case RM_RANGE_TAKEN:
			run->range.rows_checked += verify_range(run, rw, rel, false);
			rm_range_save(run);
			break;
		case RM_RANGE_NONE_FREE:
			rm_range_wait(run);
			break;
		case RM_RANGE_ALL_DONE:
			m->rows_done += rm_ranges_sum(run, true)->rows_checked;
			m->next_block = m->end_block;
			rm_ranges_forget(m);
			break;
	}
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

	if (rw == NULL)
	{
		run->helpers = 0;
		return result;
	}
	if (m->phase == VERIFY_ANALYZE)
	{
		/* nobody's DDL is to wait for it */
		table_close(rel, AccessShareLock);
		rm_rewrite_analyze(rw);
		return rm_rewrite_table_done(run, rw);
	}
	if (m->phase == VERIFY_BEGIN)
	{
		begin_verification(m, rw, rel);
		m->phase = VERIFY_ROWS;
	}
	if (m->phase == VERIFY_COUNT)
	{
		verify_count(run, rw, rel);
		m->phase = VERIFY_ANALYZE;
	}
	else if (m->next_block < m->end_block)
		verify_chunks(run, rw, rel);
	else
		m->phase = rm_rewrite_key_converts(rw) ? VERIFY_COUNT : VERIFY_ANALYZE;
	table_close(rel, NoLock);
	/* they have gone when the next transaction begins */
	if (m->next_block >= m->end_block)
		run->helpers = 0;
	(void) rm_ranges_sum(run, false);
	run->progress.blocks_done = m->next_block + run->range_sums.blocks_done;
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = m->rows_done + run->range_sums.rows_checked;
	rm_rewrite_progress(run, rw);
	return m->phase == VERIFY_ANALYZE && rw->analyzed ? rm_rewrite_table_done(run, rw) : RM_STEP_AGAIN;
}

/* one transaction's worth of a range, in a helper */
static void
help(RmRun *run, bool in_order)
{
	Relation	rel;
	RmRewrite  *rw = rm_rewrite_help(run, &rel);

	if (rw == NULL)
		return;
	run->range.rows_checked += verify_range(run, rw, rel, in_order);
	table_close(rel, NoLock);
}

static void
verify_help(RmRun *run)
{
	help(run, false);
}

/* how many helpers are to verify so many pages of the shadow while the runner is busy */
int
rm_rewrite_verifiers(int64 pages)
{
	return rm_verify_while_busy ? rm_helpers_aside_for(pages, RM_REWRITE_RANGE_PAGES) : 0;
}

/* the same in a helper of the steps copy and index, of what is as it was copied */
void
rm_verify_beside(RmRun *run)
{
	help(run, true);
}

const RmStep rm_step_rewrite_verify = {
	.name = "verify",
	.throttled = true,
	.apply = verify_apply,
	.revert = rm_rewrite_nothing,
	.help = verify_help,
};
