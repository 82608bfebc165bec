/*-------------------------------------------------------------------------
 *
 * rewrite_index.c
 *	  online_rewrite: the step "index".
 *
 * The shadow gets the indexes that PostgreSQL would make for the changed table, built
 * by sort.  A twin tells how they are defined; the table's own are compared with them
 * once more when all are there, and what somebody has made, moved or dropped meanwhile
 * is made, moved or dropped here too.
 *
 * One index each transaction, so after a crash an index is there or not.  What locks the
 * table is gone before the building begins: nobody's DDL waits for it.  Helpers verify
 * the shadow beside it (rewrite_verify.c).
 *
 * An index is built as CREATE INDEX builds it, but for the reading of the shadow.
 * heap's function for that (heapam_index_build_range_scan) has to reckon with rows of which
 * nobody knows yet whether they stay, and with chains of versions on a page, and reads a
 * table of up to a quarter of shared_buffers into these.  Hardly anything of it is so here:
 * nobody writes the shadow beside SHARE, only we do otherwise, and not by updating; and
 * nearly all of its pages are known to be visible to everybody.  So while an index is built,
 * the shadow has an access method of this process's own, which is heap's with another such
 * function (build_scan).  That is in the relcache entry alone: whatever makes that be read
 * again, as an invalidation does, puts heap's function back in its place, which gives the
 * same index.  Parallel workers have entries of their own, and take their share of the pages
 * with heap's function.
 *
 * Easy to get wrong: index_create() changes the table's row in pg_class, which reads the
 * entry again.  So the index is defined first, empty, and then built, as REINDEX does it.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/attmap.h"
#include "access/genam.h"
#include "access/heapam.h"
#include "access/relscan.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/dependency.h"
#include "catalog/index.h"
#include "catalog/namespace.h"
#include "commands/progress.h"
#include "commands/tablespace.h"
#include "compat.h"
#include "crew.h"
#include "dependents.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "pages.h"
#include "parser/parse_utilcmd.h"
#include "rewrite.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "throttle.h"
#include "twin.h"
#include "utils/backend_progress.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* one index that the changed table will have */
typedef struct Wanted
{
	Oid			original;
	IndexStmt  *stmt;			/* for the shadow */
} Wanted;

/* what the twin is asked */
typedef struct Indexes
{
	RmMigration *m;
	RmRewrite  *rw;
	MemoryContext cxt;
	List	   *wanted;			/* the key first */
	bool		changed;		/* by somebody, since the twin was made */
} Indexes;

/*
 * The twin's index as one of the shadow, as plain as its storage is: that it
 * belongs to a constraint is the table's matter.  Only what an exclusion
 * constraint forbids is looked for while the index is built.
 */
static IndexStmt *
statement_for_shadow(Indexes *i, Oid original, Relation index)
{
	IndexStmt  *stmt;
	Relation	twin = table_open(index->rd_index->indrelid, NoLock);
	AttrMap    *map = make_attrmap(RelationGetDescr(twin)->natts);
	MemoryContext oldcxt;

	for (int a = 0; a < map->maplen; a++)
		map->attnums[a] = get_attnum(i->rw->relid,
									 NameStr(TupleDescAttr(RelationGetDescr(twin), a)->attname));
	table_close(twin, NoLock);
	oldcxt = MemoryContextSwitchTo(i->cxt);
	stmt = generateClonedIndexStmt(makeRangeVar(RM_SCHEMA, rm_rewrite_shadow_name(i->rw->id, i->rw->relid), -1),
								   index, map, NULL);
	stmt->idxname = rm_rewrite_shadow_name(i->rw->id, original);
	stmt->isconstraint = stmt->excludeOpNames != NIL;
	stmt->primary = false;
	stmt->deferrable = stmt->initdeferred = false;
	/* as in ALTER TABLE: without a tablespace of its own it is in the database's */
	stmt->reset_default_tblspc = true;
	MemoryContextSwitchTo(oldcxt);
	free_attrmap(map);
	return stmt;
}

static void
ask_for_indexes(void *arg)
{
	Indexes    *i = arg;
	RmTwin		twin = rm_rewrite_make_twin(i->m, i->rw->relid);
	Oid			nspid = get_rel_namespace(twin.relid);
	Relation	rel = table_open(i->rw->relid, NoLock);
	ListCell   *lc;

	foreach(lc, RelationGetIndexList(rel))
	{
		Oid			original = lfirst_oid(lc);
		Oid			oid = get_relname_relid(psprintf("rm_x_%lld_%u", (long long) i->m->id, original),
											nspid);
		MemoryContext oldcxt;
		Relation	index;
		Wanted	   *w;

		if (!OidIsValid(oid))
		{
			/* the lock on the table lets CREATE INDEX pass */
			i->changed = true;
			break;
		}
		index = index_open(oid, AccessShareLock);
		oldcxt = MemoryContextSwitchTo(i->cxt);
		w = palloc(sizeof(Wanted));
		w->original = original;
		w->stmt = statement_for_shadow(i, original, index);
		i->wanted = original == i->rw->key_index ? lcons(w, i->wanted) : lappend(i->wanted, w);
		MemoryContextSwitchTo(oldcxt);
		index_close(index, NoLock);
	}
	table_close(rel, NoLock);
}

/*
 * The indexes that the shadow is to have (in cxt), NIL if somebody has just made one.  The
 * columns are locked.
 */
static List *
wanted_indexes(RmMigration *m, RmRewrite *rw, MemoryContext cxt)
{
	Indexes		i = {.m = m,.rw = rw,.cxt = cxt};
	ErrorData  *error = rm_rehearse(ask_for_indexes, &i, CurrentMemoryContext);

	if (error)
		ReThrowError(error);
	return i.changed ? NIL : i.wanted;
}

/* is that index in the tablespace of that name, NULL: the database's? */
static bool
is_in_tablespace(Oid index, const char *name)
{
	Oid			tablespace = get_rel_tablespace(index);

	return tablespace == (name ? get_tablespace_oid(name, true) : InvalidOid);
}

/*
 * Drops those of the shadow's indexes whose original is not there any more, or has been
 * moved: in the exchange it would get back to where it was.  True if one of these was
 * among them, which has to be built again.
 */
static bool
drop_stale_indexes(RmRewrite *rw, List *wanted)
{
	Relation	shadow = table_open(rw->shadow, AccessExclusiveLock);
	List	   *indexes = list_copy(RelationGetIndexList(shadow));
	bool		moved = false;
	ListCell   *li;
	ListCell   *lw;

	table_close(shadow, NoLock);
	foreach(li, indexes)
	{
		bool		needed = false;

		foreach(lw, wanted)
		{
			Wanted	   *w = lfirst(lw);

			if (rm_rewrite_shadow_index(rw, w->original) != lfirst_oid(li))
				continue;
			needed = is_in_tablespace(lfirst_oid(li), w->stmt->tableSpace);
			moved |= !needed;
		}
		if (needed)
			continue;
		if (OidIsValid(get_index_constraint(lfirst_oid(li))))
			rm_execute(psprintf("ALTER TABLE %s DROP CONSTRAINT %s",
								rm_relation_sql(rw->shadow), quote_identifier(get_rel_name(lfirst_oid(li)))));
		else
			rm_execute(psprintf("DROP INDEX %s", rm_relation_sql(lfirst_oid(li))));
	}
	return moved;
}

/* does the shadow have all indexes, and are they those of the present definitions? */
bool
rm_rewrite_indexes_complete(const RmRewrite *rw)
{
	return rw->fingerprint != NULL &&
		strcmp(rw->fingerprint, rm_catalog_fingerprint(rw->relid, CurrentMemoryContext)) == 0;
}

/* building; lives across transactions */
typedef struct IndexWork
{
	Oid			verified;		/* the table whose chunks helpers have been given */
	/* what it is to have, as long as that is its fingerprint */
	MemoryContext cxt;
	Oid			relid;
	char	   *fingerprint;
	List	   *wanted;
} IndexWork;

/*
 * The same as wanted_indexes(), but the twin is not asked again where nobody has changed
 * anything.
 */
static List *
known_indexes(IndexWork *work, RmMigration *m, RmRewrite *rw, const char *fingerprint)
{
	if (work->relid == rw->relid && work->wanted != NIL && strcmp(work->fingerprint, fingerprint) == 0)
		return work->wanted;
	work->wanted = NIL;
	MemoryContextReset(work->cxt);
	work->relid = rw->relid;
	work->fingerprint = MemoryContextStrdup(work->cxt, fingerprint);
	work->wanted = wanted_indexes(m, rw, work->cxt);
	return work->wanted;
}

/*
 * Has helpers verify the shadow while its indexes are built, beginning with the
 * next transaction; false if not so much is left of it that this would be worth the while.
 */
static bool
verify_beside(RmRun *run, const RmRewrite *rw)
{
	int			helpers = rm_rewrite_verifiers(rm_chunks_unverified(rw->shadow));

	if (helpers == 0)
		return false;
	run->m->relfilenode = rw->relfilenode;
	run->helpers = helpers;
	run->aside = true;
	rm_ranges_offer(run, rw->relid, 0, rm_chunks_end(rw->shadow), RM_REWRITE_RANGE_PAGES);
	return true;
}

/* as detailed as the table's, and with what somebody knows better than ANALYZE */
static void
take_statistics_settings(const RmRewrite *rw)
{
	char	   *clauses;

	rm_execute(psprintf("SELECT pg_catalog.string_agg(pg_catalog.format("
						"'ALTER %%1$I SET STATISTICS %%2$s, ALTER %%1$I %%3$s', s.attname, coalesce(a.attstattarget, -1),"
						" coalesce('SET (' || d.mine || ')', 'RESET (n_distinct)')), ', ')"
						" FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_attribute s USING (attnum),"
						" LATERAL (SELECT (SELECT o FROM pg_catalog.unnest(a.attoptions) o WHERE o LIKE 'n\\_distinct=%%'),"
						" (SELECT o FROM pg_catalog.unnest(s.attoptions) o WHERE o LIKE 'n\\_distinct=%%')) d (mine, its)"
						" WHERE a.attrelid = %u AND s.attrelid = %u AND a.attnum > 0 AND NOT a.attisdropped"
						" AND (coalesce(a.attstattarget, -1) <> coalesce(s.attstattarget, -1)"
						" OR d.mine IS DISTINCT FROM d.its)", rw->relid, rw->shadow));
	clauses = rm_result_text(0, 1);
	if (clauses)
		rm_execute(psprintf("ALTER TABLE %s %s", rm_relation_sql(rw->shadow), clauses));
}

/* statistics for the shadow, so that plans are good from the first moment */
void
rm_rewrite_analyze(RmRewrite *rw)
{
	take_statistics_settings(rw);
	rm_execute(psprintf("ANALYZE %s", rm_relation_sql(rw->shadow)));
	rw->analyzed = GetCurrentTimestamp();
	rm_rewrite_save(rw);
}

/*-------------------------------------------------------------------------
 * Building
 *-------------------------------------------------------------------------
 */

/* is what core asks for more than is here? */
static bool
is_special(IndexInfo *info, bool anyvisible, BlockNumber first, BlockNumber numblocks)
{
	return info->ii_Concurrent || anyvisible || first != 0 || numblocks != InvalidBlockNumber;
}

static void
report_done(bool progress, BlockNumber blocks)
{
	if (progress)
		pgstat_progress_update_param(PROGRESS_SCAN_BLOCKS_DONE, blocks);
}

/* a version that some snapshot may see: does everybody see it from now on? */
static bool
is_alive(const RmPages *pages, HeapTuple tup)
{
	bool		alive;

	if (pages->all_visible)
		return true;
	LockBuffer(pages->buf, BUFFER_LOCK_SHARE);
	alive = HeapTupleSatisfiesVisibility(tup, SnapshotSelf, pages->buf);
	LockBuffer(pages->buf, BUFFER_LOCK_UNLOCK);
	return alive;
}

/* a heap-only version, as somebody's UPDATE of the shadow makes one, is found by its chain */
static void
point_at_root(const RmPages *pages, HeapTuple tup)
{
	OffsetNumber roots[MaxHeapTuplesPerPage];
	OffsetNumber root;

	if (!HeapTupleIsHeapOnly(tup))
		return;
	LockBuffer(pages->buf, BUFFER_LOCK_SHARE);
	heap_get_root_tuples(BufferGetPage(pages->buf), roots);
	LockBuffer(pages->buf, BUFFER_LOCK_UNLOCK);
	root = roots[ItemPointerGetOffsetNumber(&tup->t_self) - 1];
	if (!OffsetNumberIsValid(root))
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("version (%u,%u) of table \"%s\" is not in any chain",
						pages->block, ItemPointerGetOffsetNumber(&tup->t_self),
						RelationGetRelationName(pages->rel))));
	ItemPointerSetOffsetNumber(&tup->t_self, root);
}

/*
 * As TableAmRoutine.index_build_range_scan, of a table that nobody writes.  scan: of the
 * leader of a parallel building; its pages are shared out.
 */
static double
build_scan(Relation rel, Relation index, IndexInfo *info, bool allow_sync, bool anyvisible,
		   bool progress, BlockNumber first, BlockNumber numblocks,
		   IndexBuildCallback callback, void *state, TableScanDesc scan)
{
	ParallelBlockTableScanDesc shared;
	ParallelBlockTableScanWorker mine;
	EState	   *estate;
	ExprContext *econtext;
	ExprState  *predicate;
	TupleTableSlot *slot;
	SnapshotData anybody;
	RmPages		pages;
	BlockNumber nblocks;
	BlockNumber block = 0;
	BlockNumber done = 0;
	double		rows = 0;

	if (is_special(info, anyvisible, first, numblocks))
	{
		rel->rd_tableam = GetHeapamTableAmRoutine();
		return rel->rd_tableam->index_build_range_scan(rel, index, info, allow_sync, anyvisible, progress,
													   first, numblocks, callback, state, scan);
	}
	shared = scan ? (ParallelBlockTableScanDesc) scan->rs_parallel : NULL;
	mine = scan ? ((HeapScanDesc) scan)->rs_parallelworkerdata : NULL;
	nblocks = scan ? shared->phs_nblocks : RelationGetNumberOfBlocks(rel);
	estate = CreateExecutorState();
	econtext = GetPerTupleExprContext(estate);
	slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsHeapTuple);
	econtext->ecxt_scantuple = slot;
	predicate = ExecPrepareQual(info->ii_Predicate, estate);
	if (progress)
		pgstat_progress_update_param(PROGRESS_SCAN_BLOCKS_TOTAL, nblocks);
	InitNonVacuumableSnapshot(anybody, GlobalVisTestFor(rel));
	rm_pages_begin(&pages, rel, &anybody);
	if (scan)
	{
		table_block_parallelscan_startblock_init(rel, mine, shared);
		block = table_block_parallelscan_nextpage(rel, mine, shared);
	}
	while (block < nblocks)
	{
		CHECK_FOR_INTERRUPTS();
		rm_pages_read(&pages, block);
		for (int i = 0; i < pages.nrows; i++)
		{
			HeapTupleData tup;
			Datum		values[INDEX_MAX_KEYS];
			bool		isnull[INDEX_MAX_KEYS];
			bool		alive;

			MemoryContextReset(econtext->ecxt_per_tuple_memory);
			rm_pages_row(&pages, i, &tup);
			alive = is_alive(&pages, &tup);
			if (alive)
				rows++;
			else if (HeapTupleIsHotUpdated(&tup))
			{
				/* its chain has one entry, of the version that is alive; see core's README.HOT */
				info->ii_BrokenHotChain = true;
				continue;
			}
			ExecStoreHeapTuple(&tup, slot, false);
			if (predicate && !ExecQual(predicate, econtext))
				continue;
			FormIndexDatum(info, slot, estate, values, isnull);
			point_at_root(&pages, &tup);
			callback(index, &tup.t_self, values, isnull, alive, state);
		}
		if (++done % 64 == 0)
			report_done(progress, done);
		/* InvalidBlockNumber when there is none left */
		block = scan ? table_block_parallelscan_nextpage(rel, mine, shared) : block + 1;
	}
	report_done(progress, nblocks);
	rm_pages_end(&pages);
	if (scan)
		table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	FreeExecutorState(estate);
	/* they were of that executor state */
	info->ii_ExpressionsState = NIL;
	info->ii_PredicateState = NULL;
	return rows;
}

/* defines and builds an index of the shadow; errors of unique and exclusion constraints */
static void
build_index(const RmRewrite *rw, IndexStmt *stmt)
{
	static TableAmRoutine routine;
	Oid			id = rm_define_empty_index(rw->shadow, stmt);
	Relation	shadow = table_open(rw->shadow, ShareLock);
	Relation	index = index_open(id, AccessExclusiveLock);
	const int	told[] = {PROGRESS_CREATEIDX_COMMAND, PROGRESS_CREATEIDX_INDEX_OID,
	PROGRESS_CREATEIDX_ACCESS_METHOD_OID};
	const int64 values[] = {PROGRESS_CREATEIDX_COMMAND_CREATE, id, index->rd_rel->relam};
	Oid			save_userid;
	int			save_sec_context;
	int			save_nestlevel;

	/* its expressions are run already when constants in them are folded */
	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(shadow->rd_rel->relowner, save_sec_context | SECURITY_RESTRICTED_OPERATION);
	save_nestlevel = NewGUCNestLevel();
	rm_restrict_search_path();
	pgstat_progress_start_command(PROGRESS_COMMAND_CREATE_INDEX, rw->shadow);
	pgstat_progress_update_multi_param(lengthof(told), told, values);
	routine = *GetHeapamTableAmRoutine();
	routine.index_build_range_scan = build_scan;
	shadow->rd_tableam = &routine;
	PG_TRY();
	{
		index_build(shadow, index, BuildIndexInfo(index), false, true);
	}
	PG_FINALLY();
	{
		shadow->rd_tableam = GetHeapamTableAmRoutine();
	}
	PG_END_TRY();
	pgstat_progress_end_command();
	AtEOXact_GUC(false, save_nestlevel);
	SetUserIdAndSecContext(save_userid, save_sec_context);
	index_close(index, NoLock);
	table_close(shadow, NoLock);
}

/*-------------------------------------------------------------------------
 * The step
 *-------------------------------------------------------------------------
 */

/*
 * One index each transaction.  What was mended since one could not be built is
 * in the log, so that is replayed first.
 */
static RmStepResult
index_apply(RmRun *run)
{
	RmMigration *m = run->m;
	IndexWork  *work = run->work;
	RmStepResult result;
	Relation	rel;
	RmRewrite  *rw = rm_rewrite_next(run, &rel, &result);
	List	   *wanted;
	ListCell   *lc;
	char	   *fingerprint;
	int			built = 0;

	if (rw == NULL)
		return result;
	/* what changes after this is seen by those who compare it */
	fingerprint = rm_catalog_fingerprint(rw->relid, CurrentMemoryContext);
	if (work == NULL)
	{
		bool		has_key = OidIsValid(rm_rewrite_shadow_index(rw, rw->key_index));

		/* helpers of an earlier run have gone, or find nothing any more */
		rm_ranges_forget(m);
		if (has_key)
			(void) rm_replay(run, rw, rel, NULL);
		work = run->work = MemoryContextAllocZero(run->cxt, sizeof(IndexWork));
		work->cxt = AllocSetContextCreate(run->cxt, "rm wanted indexes", ALLOCSET_SMALL_SIZES);
		if (has_key)
		{
			table_close(rel, NoLock);
			rm_rewrite_save(rw);
			return RM_STEP_AGAIN;
		}
	}
	table_close(rel, NoLock);
	if (work->verified != rw->relid)
	{
		work->verified = rw->relid;
		if (verify_beside(run, rw))
			return RM_STEP_AGAIN;
	}
	wanted = known_indexes(work, m, rw, fingerprint);
	if (wanted == NIL)
		return RM_STEP_AGAIN;
	run->progress.blocks_total = list_length(wanted);
	foreach(lc, wanted)
	{
		Wanted	   *w = lfirst(lc);

		if (OidIsValid(rm_rewrite_shadow_index(rw, w->original)))
		{
			run->progress.blocks_done = ++built;
			continue;
		}
		/* nobody's DDL is to wait for the building */
		UnlockRelationOid(rw->relid, AccessShareLock);
		rm_throttle_building();
		build_index(rw, copyObject(w->stmt));
		if (rw->analyzed)
		{
			rw->analyzed = 0;	/* not with this index's expressions */
			rm_rewrite_save(rw);
		}
		return RM_STEP_AGAIN;
	}
	if (run->helpers > 0)
	{
		UnlockRelationOid(rw->relid, AccessShareLock);
		/* what else there is to do beside them; without any the step verify does it */
		if (!rw->analyzed)
			rm_rewrite_analyze(rw);
		/* what they have not done by now is left for the verification */
		run->helpers = 0;
		return RM_STEP_AGAIN;
	}
	rm_ranges_forget(m);
	if (drop_stale_indexes(rw, wanted))
		return RM_STEP_AGAIN;
	rw->fingerprint = fingerprint;
	return rm_rewrite_table_done(run, rw);
}

/*
 * For the steps that may find that new values are not unique, or conflict: tells it of
 * the table's index, not of the shadow's.
 */
void
rm_rewrite_explain(RmRun *run, ErrorData *error)
{
	char	   *prefix = psprintf("shadow_%lld_", (long long) run->migration_id);
	MemoryContext oldcxt;
	char	   *name;

	if ((error->sqlerrcode != ERRCODE_UNIQUE_VIOLATION &&
		 error->sqlerrcode != ERRCODE_EXCLUSION_VIOLATION) ||
		error->constraint_name == NULL ||
		strncmp(error->constraint_name, prefix, strlen(prefix)) != 0)
		return;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	name = get_rel_name((Oid) strtoul(error->constraint_name + strlen(prefix), NULL, 10));
	if (name)
	{
		error->message = psprintf("the new values do not fit index \"%s\"", name);
		error->constraint_name = name;
		error->hint = psprintf("The old type tells rows apart that the new one does not: mend them, then SELECT rm_resume(%lld); or give it up with CALL rm_rollback(%lld).",
							   (long long) run->migration_id, (long long) run->migration_id);
	}
	MemoryContextSwitchTo(oldcxt);
}

const RmStep rm_step_rewrite_index = {
	.name = "index",
	.throttled = true,
	.writes_pages = true,
	.apply = index_apply,
	.revert = rm_rewrite_nothing,
	.explain = rm_rewrite_explain,
	.help = rm_verify_beside,
};

