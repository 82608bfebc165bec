/*-------------------------------------------------------------------------
 *
 * rewrite_exchange.c
 *	  online_rewrite: the steps "cut_over" and "finish".
 *
 * (Of a partitioned table, whatever is said here of the table is done with each
 * partition in one transaction, but for the ALTER TABLE, which is run on the
 * partitioned table and goes down by itself.)
 *
 * When the shadow is complete, verified and nearly up to date there is one more
 * round, and all snapshots that are older than it are waited out, holding nothing.
 * What comes after it is brought over version by version (rewrite_versions.c).
 * Then one transaction.  With SHARE UPDATE EXCLUSIVE on the table and on all whose
 * definition changes with it, which nobody minds who reads or writes, the
 * catalogs are read, and what there is in the log is replayed.  Then with ACCESS
 * EXCLUSIVE (asked for while the weaker locks are held: bounded, and in a deadlock it
 * is we who give up):
 *
 *	the rest of the log is replayed; if that is more than a few rows, the locks are
 *	let go before, so that the hold is bounded;
 *	foreign keys on the column are put aside, views, rules, policies and triggers
 *	are dropped (their definitions have been read);
 *	the table gets a new, empty heap, and PostgreSQL's own ALTER TABLE changes the
 *	type: all that the catalogs have to say is its work, and
 *	on an empty table it takes milliseconds.  Most of these would go into building
 *	indexes, for no use, each of which up to PostgreSQL 16 is put to disk at once: so
 *	when it comes to rewriting, the table has no indexes (indislive is false until it is
 *	done) and no TOAST table;
 *	where ALTER TABLE is through with a table, but is not over, table and shadow exchange
 *	their files, each index with its counterpart, and their TOAST tables;
 *	what has been dropped is made again, foreign keys NOT VALID;
 *	shadow, log and trigger go.
 *
 * "finish" proves the foreign keys, beside everybody, so that they are what they
 * were, and lets ANALYZE fill the statistics objects again.
 *
 * Who may be under way: nobody who has touched the table.  A transaction with a
 * snapshot taken after the wait but before the exchange, which first reads the
 * table after it (REPEATABLE READ, or a function that is STABLE), finds each row in
 * the version of its snapshot.  (After a blocking ALTER TABLE it finds no row at
 * all.)  Older snapshots do not exist in this database; on standbys nobody waits for
 * them.  Where it cannot be told which versions a snapshot has to find (too many
 * subtransactions at once, rows frozen in between), the round and the wait are begun
 * again, MANY_WAITS times; after that, the rows that changed since the wait are left
 * as of the last round for such a transaction.
 *
 * Easy to get wrong:
 *
 *	With wal_level = minimal, storage of this very transaction is not written to
 *	the WAL.  The table's empty storage is such, the shadow's is not: with the
 *	files the marks in the relcache must change places too, or the next write to
 *	the table in this transaction would be lost in a crash.  An index that ALTER TABLE
 *	has left alone still has its old storage, full of rows that are gone.
 *
 *	TOAST pointers name their TOAST table by OID, so the tables themselves change
 *	hands, not their files, as in ALTER TABLE.
 *
 *	Rows keep their predicate locks (SERIALIZABLE) by place, and so do ranges of an
 *	index; they are promoted to the relation before the places mean nothing any more.
 *
 *	What ALTER TABLE leaves of an index that it has made again is a file without a
 *	page: nothing may use an index before it has the shadow's storage.
 *
 *	Event triggers may do anything with the table.  Those that fire at the end of the
 *	ALTER TABLE find it complete, as after an ordinary one.  What others change, of which
 *	the shadow knows nothing, is refused (refuse_changed()).
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/multixact.h"
#include "access/table.h"
#include "access/toast_internals.h"
#include "access/xact.h"
#include "catalog/catalog.h"
#include "catalog/dependency.h"
#include "catalog/heap.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/objectaddress.h"
#include "catalog/pg_class.h"
#include "catalog/pg_index.h"
#include "catalog/pg_statistic.h"
#include "catalog/pg_type.h"
#include "commands/tablecmds.h"
#include "compat.h"
#include "definitions.h"
#include "dependents.h"
#include "executor/spi.h"
#include "leaves.h"
#include "miscadmin.h"
#include "rewrite.h"
#include "risky_migrations.h"
#include "rows.h"
#include "snapshots.h"
#include "state.h"
#include "steps.h"
#include "storage/lmgr.h"
#include "storage/predicate.h"
#include "storage/smgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/* rows of the log that are replayed under the lock, at most: some 20 ms */
#define FEW_UNDER_LOCK 300
/* with more the lock is not asked for in the same transaction */
#define FEW_BEFORE_LOCK 1000

/* the same after the wait, without beginning it again; and how often it is begun again */
#define FEW_AFTER_WAIT 50000
#define MANY_WAITS 5

/* shadows are analyzed in one transaction as long as it has lasted no longer, milliseconds */
#define ANALYZE_TIME 100
/* statistics that are older when the cut-over begins are gathered again, milliseconds */
#define STATISTICS_AGE 600000

enum
{
	CUT_ANALYZE,				/* statistics for the shadow, and a round */
	CUT_WAIT,					/* for older snapshots */
	CUT_EXCHANGE
};

/* the step; lives across transactions */
typedef struct CutOver
{
	RmSnapshotWait wait;
	RmMark	   *mark;			/* of the round before the wait; NULL: there is none */
	RmMark	   *new_mark;		/* of that in the transaction under way, once it commits */
	bool		round;			/* there was one in it */
	int			waits;			/* that were begun */
	TimestampTz old_statistics; /* those from before it are gathered again */
	bool		again;			/* everybody has to be waited for once more */
	bool		inexact;		/* that has been done often enough */
	bool		failed;			/* the round has met rows that cannot be made */
} CutOver;

/*-------------------------------------------------------------------------
 * Storage
 *-------------------------------------------------------------------------
 */

#define SWAP(type, a, b) \
	do { type swap_ = (a); (a) = (b); (b) = swap_; } while (0)

/* the TOAST tables change hands */
static void
relink_toast(Oid toast, Oid owner)
{
	ObjectAddress toast_object;
	ObjectAddress owner_object;

	if (!OidIsValid(toast))
		return;
	if (deleteDependencyRecordsFor(RelationRelationId, toast, false) != 1)
		elog(ERROR, "TOAST table %u does not depend on its table alone", toast);
	ObjectAddressSet(toast_object, RelationRelationId, toast);
	ObjectAddressSet(owner_object, RelationRelationId, owner);
	recordDependencyOn(&toast_object, &owner_object, DEPENDENCY_INTERNAL);
}

/*
 * Exchanges the storage of two relations of the same kind: mine may be of this
 * transaction, other's is older.  What pg_class tells of the storage goes with it.
 */
static void
exchange_storage(Oid mine, Oid other)
{
	Relation	pg_class = table_open(RelationRelationId, RowExclusiveLock);
	HeapTuple	a_tup = SearchSysCacheCopy1(RELOID, ObjectIdGetDatum(mine));
	HeapTuple	b_tup = SearchSysCacheCopy1(RELOID, ObjectIdGetDatum(other));
	Form_pg_class a = (Form_pg_class) GETSTRUCT(a_tup);
	Form_pg_class b = (Form_pg_class) GETSTRUCT(b_tup);
	Relation	a_rel = relation_open(mine, NoLock);
	Relation	b_rel = relation_open(other, NoLock);
	CatalogIndexState indexes;

	if (a->relkind != b->relkind || a->relam != b->relam ||
		a->relpersistence != b->relpersistence || !OidIsValid(a->relfilenode) ||
		!OidIsValid(b->relfilenode))
		elog(ERROR, "relations %u and %u cannot exchange their storage", mine, other);
	SWAP(Oid, a->relfilenode, b->relfilenode);
	SWAP(Oid, a->reltablespace, b->reltablespace);
	SWAP(int32, a->relpages, b->relpages);
	SWAP(float4, a->reltuples, b->reltuples);
	SWAP(int32, a->relallvisible, b->relallvisible);
	rm_swap_all_frozen(a, b);
	SWAP(TransactionId, a->relfrozenxid, b->relfrozenxid);
	SWAP(MultiXactId, a->relminmxid, b->relminmxid);
	if (a->reltoastrelid != b->reltoastrelid)
	{
		relink_toast(a->reltoastrelid, other);
		relink_toast(b->reltoastrelid, mine);
		SWAP(Oid, a->reltoastrelid, b->reltoastrelid);
	}

	/* see the top of the file */
	if (rm_storage_is_new(a_rel))
		rm_assume_new_storage(b_rel);
	rm_assume_old_storage(a_rel);

	indexes = CatalogOpenIndexes(pg_class);
	CatalogTupleUpdateWithInfo(pg_class, &a_tup->t_self, a_tup, indexes);
	CatalogTupleUpdateWithInfo(pg_class, &b_tup->t_self, b_tup, indexes);
	CatalogCloseIndexes(indexes);
	RelationCloseSmgr(a_rel);
	RelationCloseSmgr(b_rel);
	relation_close(a_rel, NoLock);
	relation_close(b_rel, NoLock);
	heap_freetuple(a_tup);
	heap_freetuple(b_tup);
	table_close(pg_class, RowExclusiveLock);
	CommandCounterIncrement();
}

/* somebody has changed what nobody else can: the locks are held */
static void
refuse_changed_table(const RmRewrite *rw, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("table %s was changed in the middle of its cut-over", rm_relation_sql(rw->relid)),
			 errdetail("%s Nothing has been exchanged.", what),
			 errhint("An event trigger does that, which fires for one of the commands of the cut-over: ALTER EVENT TRIGGER ... DISABLE, then SELECT rm_resume(%lld).",
					 (long long) rw->id)));
}

/*
 * An index of the table.  ALTER TABLE makes it anew, under the same name; but
 * where it is a part of the partitioned table's index, under any.
 */
typedef struct IndexPair
{
	char	   *name;
	Oid			shadow;
	bool		taken;
} IndexPair;

static List *
index_pairs(const RmRewrite *rw)
{
	Relation	rel = table_open(rw->relid, NoLock);
	List	   *pairs = NIL;
	ListCell   *lc;

	foreach(lc, RelationGetIndexList(rel))
	{
		IndexPair  *p = palloc0(sizeof(IndexPair));

		p->name = get_rel_name(lfirst_oid(lc));
		p->shadow = rm_rewrite_shadow_index(rw, lfirst_oid(lc));
		if (!OidIsValid(p->shadow))
			elog(ERROR, "the shadow has no index for \"%s\"", p->name);
		pairs = lappend(pairs, p);
	}
	table_close(rel, NoLock);
	return pairs;
}

/* are both indexes of the same columns, in the same way?  If closely, also of the same expressions and rows */
static bool
same_index(Oid mine, Oid other, bool closely)
{
	Relation	a = index_open(mine, AccessExclusiveLock);
	Relation	b = index_open(other, AccessExclusiveLock);
	int			n = a->rd_index->indnatts;
	int			nkeys = a->rd_index->indnkeyatts;
	bool		same;

	same = n == b->rd_index->indnatts && nkeys == b->rd_index->indnkeyatts &&
		a->rd_index->indisunique == b->rd_index->indisunique &&
		memcmp(a->rd_index->indkey.values, b->rd_index->indkey.values, sizeof(int16) * n) == 0 &&
		memcmp(a->rd_opfamily, b->rd_opfamily, sizeof(Oid) * nkeys) == 0 &&
		memcmp(a->rd_opcintype, b->rd_opcintype, sizeof(Oid) * nkeys) == 0 &&
		memcmp(a->rd_indcollation, b->rd_indcollation, sizeof(Oid) * nkeys) == 0 &&
		memcmp(a->rd_indoption, b->rd_indoption, sizeof(int16) * nkeys) == 0 &&
		(!closely || (equal(RelationGetIndexExpressions(a), RelationGetIndexExpressions(b)) &&
					  equal(RelationGetIndexPredicate(a), RelationGetIndexPredicate(b))));
	index_close(a, NoLock);
	index_close(b, NoLock);
	return same;
}

/* the shadow's like of an index that ALTER TABLE has made, or left alone */
static Oid
pair_of(List *pairs, Oid index)
{
	const char *name = get_rel_name(index);
	ListCell   *lc;

	foreach(lc, pairs)
	{
		IndexPair  *p = lfirst(lc);

		if (strcmp(p->name, name) == 0 && same_index(index, p->shadow, false))
		{
			p->taken = true;
			return p->shadow;
		}
	}
	return InvalidOid;
}

/* of those that have got another name, one that is left */
static Oid
pair_left_of(const RmRewrite *rw, List *pairs, Oid index)
{
	ListCell   *lc;

	foreach(lc, pairs)
	{
		IndexPair  *p = lfirst(lc);

		if (!p->taken && same_index(index, p->shadow, true))
		{
			p->taken = true;
			return p->shadow;
		}
	}
	refuse_changed_table(rw, psprintf("Index \"%s\" is none of those that were built.",
									  get_rel_name(index)));
	return InvalidOid;
}

static Oid
toast_of(Oid relid)
{
	Relation	rel = table_open(relid, NoLock);
	Oid			toast = rel->rd_rel->reltoastrelid;

	table_close(rel, NoLock);
	return toast;
}

/* ALTER TABLE gives it another name, and takes it for new, locked by whoever has made it */
static void
lock_toast_index(Oid relid)
{
	Oid			toast = toast_of(relid);

	if (OidIsValid(toast))
		(void) toast_get_valid_index(toast, AccessExclusiveLock);
}

/* the TOAST table that has come from the shadow gets the name it should have */
static void
name_toast(Oid relid)
{
	Oid			toast = toast_of(relid);
	Oid			index;

	if (!OidIsValid(toast))
		return;
	index = toast_get_valid_index(toast, NoLock);
	RenameRelationInternal(toast, psprintf("pg_toast_%u", relid), true, false);
	RenameRelationInternal(index, psprintf("pg_toast_%u_index", relid), true, true);
	CommandCounterIncrement();
	ResetRelRewrite(toast);
	CommandCounterIncrement();
}

/*-------------------------------------------------------------------------
 * Statistics
 *-------------------------------------------------------------------------
 */

/* what ANALYZE has found out about a column of the shadow is true of the table's */
static void
take_statistics(Oid from, Oid to, AttrNumber attnum)
{
	Relation	pg_statistic = table_open(StatisticRelationId, RowExclusiveLock);
	HeapTuple	tup = SearchSysCacheCopy3(STATRELATTINH, ObjectIdGetDatum(from),
										  Int16GetDatum(attnum), BoolGetDatum(false));

	if (HeapTupleIsValid(tup))
	{
		ItemPointerData tid = tup->t_self;

		((Form_pg_statistic) GETSTRUCT(tup))->starelid = to;
		if (SearchSysCacheExists3(STATRELATTINH, ObjectIdGetDatum(to),
								  Int16GetDatum(attnum), BoolGetDatum(false)))
			RemoveStatistics(to, attnum);
		CatalogTupleUpdate(pg_statistic, &tid, tup);
		heap_freetuple(tup);
		CommandCounterIncrement();
	}
	table_close(pg_statistic, RowExclusiveLock);
}

/*
 * The same of an index, whose expressions have statistics of their own.  What ALTER TABLE
 * has left alone keeps those that it has, as other columns do: to its own target.
 */
static void
take_index_statistics(Oid from, Oid to)
{
	Relation	index = index_open(to, AccessExclusiveLock);

	for (int i = 0; i < index->rd_index->indnkeyatts; i++)
		if (index->rd_index->indkey.values[i] == 0 &&
			!SearchSysCacheExists3(STATRELATTINH, ObjectIdGetDatum(to), Int16GetDatum(i + 1),
								   BoolGetDatum(false)))
			take_statistics(from, to, i + 1);
	index_close(index, NoLock);
}

/*-------------------------------------------------------------------------
 * Foreign keys
 *-------------------------------------------------------------------------
 */

/* a foreign key on a column that changes, at either end */
typedef struct ForeignKey
{
	Oid			relid;
	Oid			peer;
	char	   *drop_sql;
	char	   *add_sql;		/* NOT VALID */
	char	   *comment_sql;	/* or NULL */
	char	   *validate_sql;	/* NULL: it was not valid before */
} ForeignKey;

static List *
foreign_keys(const RmMigration *m)
{
	Oid			types[] = {OIDOID, INT2ARRAYOID};
	Datum		v[] = {ObjectIdGetDatum(m->relid), rm_attnum_array(rm_attnums_of(m->columns, m->relid))};
	List	   *list = NIL;

	rm_catalog_query("SELECT relid::int8, peer::int8, drop_sql, add_sql, comment_sql, validate_sql"
					 " FROM risky_migrations.column_foreign_keys($1, $2)",
					 2, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		ForeignKey *k = palloc(sizeof(ForeignKey));

		k->relid = rm_result_int64(i, 1);
		k->peer = rm_result_int64(i, 2);
		k->drop_sql = rm_result_text(i, 3);
		k->add_sql = rm_result_text(i, 4);
		k->comment_sql = rm_result_text(i, 5);
		k->validate_sql = rm_result_text(i, 6);
		list = lappend(list, k);
	}
	return list;
}

/* what "finish" has to prove */
static void
note_proofs(const RmMigration *m, List *keys)
{
	Oid			types[] = {INT8OID, TEXTARRAYOID};
	Datum		v[2];
	List	   *proofs = NIL;
	ListCell   *lc;

	foreach(lc, keys)
		if (((ForeignKey *) lfirst(lc))->validate_sql)
			proofs = lappend(proofs, ((ForeignKey *) lfirst(lc))->validate_sql);
	v[0] = Int64GetDatum(m->id);
	v[1] = rm_settings_array(proofs);
	rm_state_execute("UPDATE risky_migrations.migration SET to_prove = $2 WHERE id = $1",
					 2, types, v, NULL);
}

/*-------------------------------------------------------------------------
 * cut_over
 *-------------------------------------------------------------------------
 */

/* an ordinary table, with its TOAST table */
static List *
add_storage(List *list, Oid relid)
{
	HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));

	if (!HeapTupleIsValid(tup))
		return list;
	list = list_append_unique_oid(list, relid);
	if (OidIsValid(((Form_pg_class) GETSTRUCT(tup))->reltoastrelid))
		list = list_append_unique_oid(list, ((Form_pg_class) GETSTRUCT(tup))->reltoastrelid);
	ReleaseSysCache(tup);
	return list;
}

/* all relations that the exchange changes; the table first */
static List *
relations_to_lock(const RmMigration *m, List *tables)
{
	List	   *list = list_concat_unique_oid(rm_relations_of_definitions(m, rm_attnums_of(m->columns, m->relid)),
											  rm_tree(m->relid));
	ListCell   *lc;

	list = list_concat_unique_oid(list, rm_rewrite_tables_with_trigger(m));
	foreach(lc, foreign_keys(m))
	{
		list = list_append_unique_oid(list, ((ForeignKey *) lfirst(lc))->relid);
		list = list_append_unique_oid(list, ((ForeignKey *) lfirst(lc))->peer);
	}
	foreach(lc, tables)
	{
		list = add_storage(list, ((RmRewrite *) lfirst(lc))->relid);
		list = add_storage(list, ((RmRewrite *) lfirst(lc))->shadow);
		/* it is dropped, and would be waited for then, by VACUUM for example */
		list = add_storage(list, ((RmRewrite *) lfirst(lc))->log);
	}
	return lcons_oid(m->relid, list_delete_oid(list, m->relid));
}

/* a table that holds rows, on its way to other storage */
typedef struct Exchange
{
	RmRewrite  *rw;
	List	   *pairs;			/* of IndexPair */
	int			nchecks;		/* CHECK constraints that the new rows were tried on */
	Oid			heap;			/* the transient one that ALTER TABLE makes for it, or InvalidOid */
	List	   *hidden;			/* OIDs of indexes */
	bool		done;
} Exchange;

/* those of the ALTER TABLE of ours that is under way, or NIL; see object_access() */
static List *altering = NIL;
static MemoryContext altering_cxt;
static object_access_hook_type next_object_access_hook = NULL;

/* are these indexes there, or not? */
static void
set_live(List *indexes, bool live)
{
	Relation	pg_index = table_open(IndexRelationId, RowExclusiveLock);
	ListCell   *lc;

	foreach(lc, indexes)
	{
		HeapTuple	tup = SearchSysCacheCopy1(INDEXRELID, ObjectIdGetDatum(lfirst_oid(lc)));
		Form_pg_index form = (Form_pg_index) GETSTRUCT(tup);

		form->indislive = live;
		/* what they are about to get is a complete index, whatever they were; so it is after REINDEX */
		if (live)
		{
			form->indisready = form->indisvalid = true;
			form->indcheckxmin = false;
		}
		CatalogTupleUpdate(pg_index, &tup->t_self, tup);
		CacheInvalidateRelcacheByRelid(form->indrelid);
		heap_freetuple(tup);
	}
	table_close(pg_index, RowExclusiveLock);
}

static void
hide_indexes(Exchange *x)
{
	Relation	rel = table_open(x->rw->relid, NoLock);
	MemoryContext oldcxt = MemoryContextSwitchTo(altering_cxt);

	x->hidden = list_copy(RelationGetIndexList(rel));
	MemoryContextSwitchTo(oldcxt);
	table_close(rel, NoLock);
	set_live(x->hidden, false);
}

/* the new heap of a table without a TOAST table gets none; what the table had goes with the shadow */
static void
hide_toast(Oid relid, Oid shadow)
{
	Relation	pg_class = table_open(RelationRelationId, RowExclusiveLock);
	HeapTuple	tup = SearchSysCacheCopy1(RELOID, ObjectIdGetDatum(relid));
	Form_pg_class form = (Form_pg_class) GETSTRUCT(tup);

	if (OidIsValid(form->reltoastrelid))
	{
		relink_toast(form->reltoastrelid, shadow);
		form->reltoastrelid = InvalidOid;
		CatalogTupleUpdate(pg_class, &tup->t_self, tup);
	}
	heap_freetuple(tup);
	table_close(pg_class, RowExclusiveLock);
}

/* those on pages of an index */
static void
promote_predicate_locks(Oid relid)
{
	Relation	index = index_open(relid, AccessExclusiveLock);

	TransferPredicateLocksToHeapRelation(index);
	index_close(index, NoLock);
}

/* table and shadow, indexes and TOAST tables change their storage */
static void
exchange_files(Exchange *x)
{
	RmRewrite  *rw = x->rw;
	Relation	rel;
	List	   *indexes;
	List	   *shadows = NIL;
	ListCell   *lc;
	ListCell   *ls;

	x->done = true;
	set_live(x->hidden, true);
	CommandCounterIncrement();
	rel = table_open(rw->relid, NoLock);
	indexes = list_copy(RelationGetIndexList(rel));
	table_close(rel, NoLock);
	exchange_storage(rw->relid, rw->shadow);
	foreach(lc, indexes)
		shadows = lappend_oid(shadows, pair_of(x->pairs, lfirst_oid(lc)));
	forboth(lc, indexes, ls, shadows)
	{
		if (!OidIsValid(lfirst_oid(ls)))
			lfirst_oid(ls) = pair_left_of(rw, x->pairs, lfirst_oid(lc));
		promote_predicate_locks(lfirst_oid(lc));
		exchange_storage(lfirst_oid(lc), lfirst_oid(ls));
		take_index_statistics(lfirst_oid(ls), lfirst_oid(lc));
	}
	foreach(lc, rw->attnums)
		take_statistics(rw->shadow, rw->relid, lfirst_int(lc));
	rm_rewrite_drop(rw);
	lock_toast_index(rw->relid);
}

static int
count_checks(Relation rel)
{
	return RelationGetDescr(rel)->constr ? RelationGetDescr(rel)->constr->num_check : 0;
}

/* are the columns of both the same? */
static bool
same_columns(Relation rel, Relation shadow)
{
	TupleDesc	a = RelationGetDescr(rel);
	TupleDesc	b = RelationGetDescr(shadow);

	if (a->natts != b->natts)
		return false;
	for (int i = 0; i < a->natts; i++)
	{
		Form_pg_attribute x = TupleDescAttr(a, i);
		Form_pg_attribute y = TupleDescAttr(b, i);

		if (x->attisdropped != y->attisdropped ||
			(!x->attisdropped && (x->atttypid != y->atttypid || x->atttypmod != y->atttypmod ||
								  x->attcollation != y->attcollation ||
								  rm_attribute_not_null(a, i) != rm_attribute_not_null(b, i) ||
								  x->attstorage != y->attstorage || x->attcompression != y->attcompression)))
			return false;
	}
	return true;
}

/*
 * Is the table, empty and with its definition changed, what the shadow was made for?  Event
 * triggers may have come in between that fire for what was done before, or when the ALTER
 * TABLE starts.
 */
static void
refuse_changed(const Exchange *x)
{
	Relation	rel = table_open(x->rw->relid, NoLock);
	Relation	shadow = table_open(x->rw->shadow, NoLock);
	const char *what = NULL;

	if (rel->rd_rel->relowner != shadow->rd_rel->relowner)
		what = "It has another owner.";
	else if (rel->rd_rel->reltablespace != shadow->rd_rel->reltablespace)
		what = "It is in another tablespace.";
	else if (!same_columns(rel, shadow) || count_checks(rel) != x->nchecks)
		what = "It has other columns or CHECK constraints.";
	else if (!rm_rewrite_has_right_toast(rel, shadow))
		what = "Its TOAST table has other options.";
	else if (RelationGetNumberOfBlocks(rel) != 0)
		what = "Rows were written to it.";
	table_close(rel, NoLock);
	table_close(shadow, NoLock);
	if (what)
		refuse_changed_table(x->rw, what);
}

/* ALTER TABLE has made a heap: if it is for one of our tables, that has nothing to be filled */
static void
heap_made(Oid heap)
{
	Relation	rel = RelationIdGetRelation(heap);
	ListCell   *lc;

	if (!RelationIsValid(rel))
		return;
	foreach(lc, altering)
	{
		Exchange   *x = lfirst(lc);

		if (x->rw->relid != rel->rd_rel->relrewrite || x->done)
			continue;
		x->heap = heap;
		refuse_changed(x);
		hide_indexes(x);
		hide_toast(x->rw->relid, x->rw->shadow);
	}
	RelationClose(rel);
}

/*
 * Told of each heap that is made or dropped.  ALTER TABLE makes one for each of our tables
 * once it has changed all definitions.  What is changed then, and the rows of that heap in
 * the catalogs, are seen together, at the next command counter.  And it drops it, with the
 * table's former storage, when there is nothing left for it to do: before event triggers are
 * fired, so that these find the table complete.
 */
static void
object_access(ObjectAccessType access, Oid class_id, Oid object_id, int sub_id, void *arg)
{
	ListCell   *lc;

	if (next_object_access_hook)
		next_object_access_hook(access, class_id, object_id, sub_id, arg);
	if (altering == NIL || class_id != RelationRelationId || sub_id != 0)
		return;
	if (access == OAT_POST_CREATE)
		heap_made(object_id);
	else if (access == OAT_DROP)
		foreach(lc, altering)
			if (((Exchange *) lfirst(lc))->heap == object_id)
				exchange_files(lfirst(lc));
}

/*
 * PostgreSQL's own ALTER TABLE, as the table's owner, on the empty table, and its
 * partitions.  What it rewrites has the shadow's storage afterwards.
 */
static void
alter_type(const RmMigration *m, List *exchanges)
{
	static bool hooked = false;
	Relation	rel = table_open(m->relid, NoLock);
	Oid			owner = rel->rd_rel->relowner;
	Oid			save_userid;
	int			save_sec_context;

	table_close(rel, NoLock);
	if (m->columns == NIL)
		return;
	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(owner, save_sec_context | SECURITY_LOCAL_USERID_CHANGE);
	if (!hooked)
	{
		/* for good: others may have hooked themselves in by the time it is over */
		next_object_access_hook = object_access_hook;
		object_access_hook = object_access;
		hooked = true;
	}
	altering = exchanges;
	altering_cxt = CurrentMemoryContext;
	PG_TRY();
	{
		rm_execute(psprintf("ALTER TABLE %s %s", rm_relation_sql(m->relid),
							rm_alter_clauses(m->columns, m->relid, true)));
	}
	PG_FINALLY();
	{
		altering = NIL;
	}
	PG_END_TRY();
	SetUserIdAndSecContext(save_userid, save_sec_context);
	CommandCounterIncrement();
}

/* where there is no ALTER TABLE, with what it does last else */
static void
exchange_unaltered(Exchange *x)
{
	Relation	rel;

	refuse_changed(x);
	exchange_files(x);
	name_toast(x->rw->relid);
	rel = table_open(x->rw->relid, NoLock);
	RelationClearMissing(rel);
	table_close(rel, NoLock);
	CommandCounterIncrement();
}

/* what the exchange has to know of the catalogs */
typedef struct ExchangePlan
{
	List	   *relids;			/* to be locked */
	List	   *marks;			/* of them, see rm_relation_marks() */
	List	   *definitions;
	List	   *keys;
	List	   *tables;			/* of RmRewrite */
	List	   *exchanges;		/* of Exchange, for each of them */
} ExchangePlan;

static Exchange *
plan_exchange(RmRewrite *rw)
{
	Exchange   *x = palloc0(sizeof(Exchange));
	Relation	rel = table_open(rw->relid, NoLock);

	x->rw = rw;
	x->pairs = index_pairs(rw);
	x->nchecks = count_checks(rel);
	table_close(rel, NoLock);
	return x;
}

/* does each table stand as its shadow was made for?  If not, *result is what the step returns */
static bool
tables_stand(RmRun *run, List *tables, RmStepResult *result)
{
	ListCell   *lc;

	foreach(lc, tables)
	{
		RmRewrite  *rw = lfirst(lc);
		Relation	rel = table_open(rw->relid, NoLock);
		bool		stands = rm_rewrite_stands(run, rw, rel, result);

		table_close(rel, NoLock);
		if (!stands)
			return false;
	}
	return true;
}

/*
 * Somebody may have made, dropped or changed an index or the like: then the
 * indexes are built again, and *result is what the step returns.
 */
static bool
indexes_complete(RmRun *run, List *tables, RmStepResult *result)
{
	ListCell   *lc;

	foreach(lc, tables)
		if (!rm_rewrite_indexes_complete(lfirst(lc)))
		{
			*result = rm_rewrite_back_to(run, lfirst(lc), RM_REWRITE_INDEX);
			return false;
		}
	return true;
}

/*
 * Reads the catalogs, with SHARE UPDATE EXCLUSIVE on all that they tell of: others
 * read and write, but whoever would change a definition waits, and finds it
 * exchanged.  What that lock does not hold still (privileges, comments, a new view) is
 * known by the marks.  NULL if something has to be done before: *result is what the step
 * returns.
 */
static ExchangePlan *
make_plan(RmRun *run, List *tables, RmStepResult *result)
{
	RmMigration *m = run->m;
	ExchangePlan *plan = palloc0(sizeof(ExchangePlan));
	List	   *tables_now;
	ListCell   *lc;

	rm_lock_check_room(m->method->name, m->relid, m->columns, m->id);
	plan->relids = relations_to_lock(m, tables);
	rm_lock_relations(&run->locks, plan->relids, ShareUpdateExclusiveLock, run->tries);
	plan->marks = rm_relation_marks(plan->relids);	/* before anything else is read */
	if (!rm_rewrite_all(run, &tables_now, result))
		return NULL;
	if (list_difference_oid(relations_to_lock(m, tables_now), plan->relids) != NIL)
		rm_refuse_just_changed(m);
	plan->tables = tables_now;
	if (!tables_stand(run, plan->tables, result) || !indexes_complete(run, plan->tables, result))
		return NULL;
	if (rm_rewrite_by_leaf(m))
	{
		/* such as have come since it began */
		Relation	rel = table_open(m->relid, NoLock);

		rm_rewrite_refuse_obstacles(rel, m->columns);
		table_close(rel, NoLock);
	}
	plan->definitions = rm_definitions_on(m, rm_attnums_of(m->columns, m->relid));
	plan->keys = foreign_keys(m);
	foreach(lc, plan->tables)
		plan->exchanges = lappend(plan->exchanges, plan_exchange(lfirst(lc)));
	return plan;
}

/*
 * The table gets an empty heap.  That is enough for ALTER TABLE, which reads
 * neither the indexes nor the TOAST table of what it rewrites.
 */
static void
make_empty(Oid relid)
{
	Relation	rel = table_open(relid, NoLock);

	CheckTableNotInUse(rel, "ALTER TABLE");
	TransferPredicateLocksToHeapRelation(rel);
	rm_set_new_storage(rel);
	table_close(rel, NoLock);
	CommandCounterIncrement();
}

/* are there more changes than so many? */
static bool
logs_are_long(List *tables, int64 limit)
{
	int64		n = 0;
	ListCell   *lc;

	PushActiveSnapshot(GetTransactionSnapshot());
	foreach(lc, tables)
	{
		Relation	log = table_open(((RmRewrite *) lfirst(lc))->log, AccessShareLock);

		n += rm_log_count(log, GetActiveSnapshot(), limit + 1 - n);
		table_close(log, NoLock);
		if (n > limit)
			break;
	}
	PopActiveSnapshot();
	return n > limit;
}

/* what was written since the last round would be lost */
static void
refuse_written(RmMigration *m, List *tables)
{
	ListCell   *lc;

	foreach(lc, tables)
	{
		RmRewrite  *rw = lfirst(lc);
		Relation	rel = table_open(rw->relid, NoLock);
		bool		missed = rm_rewrite_missed(m, rw, rel) != NULL;

		table_close(rel, NoLock);
		if (missed || logs_are_long(list_make1(rw), 0))
			refuse_changed_table(rw, "Rows were written to it.");
	}
}

/* everything of the exchange; the locks are held, the logs are empty */
static void
exchange(RmRun *run, ExchangePlan *plan)
{
	RmMigration *m = run->m;
	ListCell   *lc;

	rm_definitions_drop(plan->definitions);
	foreach(lc, plan->keys)
		rm_execute(((ForeignKey *) lfirst(lc))->drop_sql);
	refuse_written(m, plan->tables);
	foreach(lc, plan->tables)
		make_empty(((RmRewrite *) lfirst(lc))->relid);
	/* what is written from here on is on pages where there should be none */
	rm_rewrite_drop_trigger(m);
	note_proofs(m, plan->keys);
	alter_type(m, plan->exchanges);
	foreach(lc, plan->exchanges)
		if (!((Exchange *) lfirst(lc))->done)
			exchange_unaltered(lfirst(lc));

	foreach(lc, plan->keys)
	{
		rm_execute(((ForeignKey *) lfirst(lc))->add_sql);
		if (((ForeignKey *) lfirst(lc))->comment_sql)
			rm_execute(((ForeignKey *) lfirst(lc))->comment_sql);
	}
	rm_definitions_make(plan->definitions, NIL);
}

static int64
failed_rows(List *tables)
{
	int64		failed = 0;
	ListCell   *lc;

	foreach(lc, tables)
		failed += ((RmRewrite *) lfirst(lc))->rows_failed;
	return failed;
}

/*
 * Rows that cannot be made stand in the way.  Not in the transaction that has met
 * them: it would take back what it has recorded of them.
 */
static void
refuse_failed_rows(RmRun *run, List *tables)
{
	int64		failed = failed_rows(tables);

	if (failed > 0)
		ereport(ERROR,
				(errcode(ERRCODE_NOT_NULL_VIOLATION),
				 errmsg_plural("%lld row of %s has no new value",
							   "%lld rows of %s have no new value",
							   (unsigned long) failed, (long long) failed,
							   run->relation),
				 errdetail("There are values of %s that do not convert, or that the changed table would refuse. Nothing has been exchanged.",
						   rm_columns_text(run->m->columns)),
				 errhint("SELECT * FROM rm_conversion_errors; mend these rows, then SELECT rm_resume(%lld).",
						 (long long) run->migration_id)));
}

/*
 * A round for each table, all with one snapshot; then snapshots older than this
 * transaction have to be waited for.  False if something has to be done before:
 * *result is what the step returns.
 */
static bool
replay_all(RmRun *run, List *tables, RmStepResult *result)
{
	CutOver    *c = run->work;
	Snapshot	snapshot;
	/* the first is the one that must be there */
	List	   *relids = list_make1_oid(run->m->relid);
	ListCell   *lc;

	foreach(lc, tables)
		relids = list_append_unique_oid(relids, ((RmRewrite *) lfirst(lc))->relid);
	rm_lock_relations(&run->locks, relids, AccessShareLock, run->tries);
	if (!tables_stand(run, tables, result))
		return false;
	/* the keys of all rows that could not be made are in the logs: they are met again */
	if (!run->m->null_on_error)
		rm_forget_failures(run->m);
	snapshot = RegisterSnapshot(GetTransactionSnapshot());
	foreach(lc, tables)
	{
		RmRewrite  *rw = lfirst(lc);
		Relation	rel = table_open(rw->relid, NoLock);

		rw->snapshot = snapshot;
		(void) rm_replay_round(run, rw, rel, NULL);
		rw->snapshot = NULL;
		table_close(rel, NoLock);
	}
	c->new_mark = rm_mark_of(snapshot, run->cxt);
	c->round = true;
	UnregisterSnapshot(snapshot);
	return true;
}

/*
 * What came since the wait, version by version; the tables are locked.  Where that
 * cannot be had everybody is waited for again, until that was tried too often.
 */
static void
replay_rest(RmRun *run, List *tables)
{
	CutOver    *c = run->work;
	ListCell   *lc;

	foreach(lc, tables)
	{
		RmRewrite  *rw = lfirst(lc);
		Relation	rel = table_open(rw->relid, NoLock);

		if (c->inexact)
			(void) rm_replay(run, rw, rel, NULL);
		else if (c->mark == NULL || !rm_replay_versions(run, rw, rel, c->mark))
		{
			c->again = true;
			ereport(ERROR,
					(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					 errmsg("older snapshots have to be waited for again")));
		}
		rm_rewrite_save(rw);
		table_close(rel, NoLock);
	}
	if (failed_rows(tables) > 0)
	{
		c->again = true;		/* the next round records and refuses them */
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("rows that cannot be made have to be recorded")));
	}
}

/*
 * The last transaction, or a try of it.  All that can be done beside others comes
 * first, and one more round, so that little is left for the strong lock.
 */
static RmStepResult
try_exchange(RmRun *run, List *tables)
{
	RmMigration *m = run->m;
	RmStepResult result;
	ExchangePlan *plan = make_plan(run, tables, &result);
	ListCell   *lc;
	bool		is_long;

	if (plan == NULL)
		return result;
	is_long = logs_are_long(plan->tables, FEW_BEFORE_LOCK);
	replay_rest(run, plan->tables);
	if (is_long)
		return RM_STEP_AGAIN;

	rm_lock_relations(&run->locks, plan->relids, AccessExclusiveLock, run->tries);
	/* the weaker lock has kept away whoever would have changed the rest */
	foreach(lc, plan->tables)
	{
		RmRewrite  *rw = lfirst(lc);
		Relation	rel = table_open(rw->relid, NoLock);
		const char *missed = rm_rewrite_missed(m, rw, rel);

		table_close(rel, NoLock);
		if (missed)
			return rm_rewrite_start_over(run, rw->relid, missed);
	}
	if (!equal(plan->marks, rm_relation_marks(plan->relids)))
		rm_refuse_just_changed(m);
	if (logs_are_long(plan->tables, FEW_UNDER_LOCK))
		return RM_STEP_AGAIN;
	replay_rest(run, plan->tables);
	run->old_storage = rm_relation_storage(m->relid);
	foreach(lc, plan->tables)
		if (((RmRewrite *) lfirst(lc))->relid != m->relid)
			run->old_storage = list_concat(run->old_storage,
										   rm_relation_storage(((RmRewrite *) lfirst(lc))->relid));
	exchange(run, plan);
	return RM_STEP_DONE;
}

/*
 * Statistics for shadows that have none yet, as many as there is time for in one
 * transaction; false if they all have.
 */
static bool
analyze_next(List *tables, const CutOver *c)
{
	instr_time	begun;
	bool		done = false;
	ListCell   *lc;

	INSTR_TIME_SET_CURRENT(begun);
	foreach(lc, tables)
	{
		RmRewrite  *rw = lfirst(lc);

		if (rw->analyzed > c->old_statistics)
			continue;
		if (done && rm_elapsed_ms(begun) > ANALYZE_TIME)
			break;
		rm_rewrite_analyze(rw);
		done = true;
	}
	return done;
}

/* a new run has not waited for anybody, and what statistics there are may be old */
static void
begin_run(RmRun *run)
{
	CutOver    *c = MemoryContextAllocZero(run->cxt, sizeof(CutOver));

	c->old_statistics = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), -STATISTICS_AGE);
	run->work = c;
	run->m->phase = CUT_ANALYZE;
}

static RmStepResult
cut_over_apply(RmRun *run)
{
	RmMigration *m = run->m;
	RmStepResult result = RM_STEP_AGAIN;
	CutOver    *c;
	bool		begun = false;
	List	   *tables;
	ListCell   *lc;

	if (!rm_rewrite_all(run, &tables, &result))
		return result;
	if (run->work == NULL)
	{
		rm_lock_check_room(m->method->name, m->relid, m->columns, m->id);
		begin_run(run);
		begun = true;
	}
	c = run->work;
	c->round = false;
	if (c->again)
		m->phase = CUT_ANALYZE;
	c->again = false;
	if (c->failed)
		refuse_failed_rows(run, tables);
	c->failed = false;
	foreach(lc, tables)
		if (((RmRewrite *) lfirst(lc))->steps_done < RM_REWRITE_CUT_OVER)
			return rm_rewrite_back_to(run, lfirst(lc), ((RmRewrite *) lfirst(lc))->steps_done);
	/* not each time: there may be many, and each look takes milliseconds */
	if (begun && !indexes_complete(run, tables, &result))
		return result;
	/* what a failure would take back is not done by those who try again */
	if (begun)
		return RM_STEP_AGAIN;
	switch (m->phase)
	{
		case CUT_ANALYZE:
			if (analyze_next(tables, c))
				break;
			if (!replay_all(run, tables, &result))
				return result;
			c->failed = failed_rows(tables) > 0;
			if (c->failed)
				break;
			c->wait = (RmSnapshotWait) {0};
			c->inexact = ++c->waits > MANY_WAITS;
			m->phase = CUT_WAIT;
			break;

		case CUT_WAIT:
			if (rm_wait_for_snapshots(run, &c->wait, "the storage from being exchanged",
									  "with it, it would not find the rows that were changed since",
									  psprintf("SELECT rm_resume(%lld)", (long long) m->id)))
				m->phase = c->waits < MANY_WAITS && logs_are_long(tables, FEW_AFTER_WAIT) ?
					CUT_ANALYZE : CUT_EXCHANGE;
			break;

		default:
			return try_exchange(run, tables);
	}
	return RM_STEP_AGAIN;
}

/* what was raised by replay_rest() is nobody's fault */
static bool
cut_over_retry(RmRun *run, ErrorData *error)
{
	CutOver    *c = run->work;

	return c && c->again;
}

static void
cut_over_committed(RmRun *run, RmStepResult result)
{
	CutOver    *c = run->work;

	if (c && c->round)
		c->mark = c->new_mark;
	if (!run->revert && result == RM_STEP_DONE)
		ereport(NOTICE,
				(errmsg("migration %lld: the rewritten storage has taken its place",
						(long long) run->migration_id)));
}

/*
 * ALTER TABLE gives the indexes that belong to one of the partitioned table new
 * names, and these may be those of others that it makes afterwards.
 */
static void
cut_over_explain(RmRun *run, ErrorData *error)
{
	MemoryContext oldcxt;

	rm_rewrite_explain(run, error);
	if (error->sqlerrcode != ERRCODE_DUPLICATE_TABLE)
		return;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	error->detail = pstrdup("ALTER TABLE gives a new name to each index that belongs to one of the partitioned table: here it is the name of another index of the partition. Nothing has been exchanged.");
	error->hint = psprintf("Rename that index, then SELECT rm_resume(%lld).",
						   (long long) run->migration_id);
	MemoryContextSwitchTo(oldcxt);
}

/* after the exchange there is nothing to go back to */
static RmStepResult
cut_over_revert(RmRun *run)
{
	if (run->m->steps_done > RM_REWRITE_CUT_OVER)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("migration %lld cannot be taken back after its cut-over",
						(long long) run->migration_id),
				 errdetail("online_rewrite leaves nothing of the old storage."),
				 errhint("Change the type back by a migration of its own, with the inverse expression.")));
	return RM_STEP_DONE;
}

const RmStep rm_step_rewrite_cut_over = {
	.name = "cut_over",
	.cuts_over = true,
	.locks_once = true,
	.apply = cut_over_apply,
	.revert = cut_over_revert,
	.committed = cut_over_committed,
	.explain = cut_over_explain,
	.retry = cut_over_retry,
};

/*-------------------------------------------------------------------------
 * finish
 *-------------------------------------------------------------------------
 */

/*
 * Statistics objects have lost what they had gathered with the ALTER TABLE, as
 * they do in an ordinary one; so has a table that is partitioned, or has children, of
 * all rows.
 */
static void
analyze_where_needed(RmMigration *m)
{
	ListCell   *lc;

	if (rm_rewrite_by_leaf(m))
		rm_execute(psprintf("ANALYZE %s", rm_relation_sql(m->relid)));
	if (rm_is_parted(m))
		return;
	foreach(lc, rm_tree_leaves(m->relid))
	{
		Relation	rel = table_open(lfirst_oid(lc), NoLock);
		bool		needed = RelationGetStatExtList(rel) != NIL;

		table_close(rel, NoLock);
		if (needed)
			rm_execute(psprintf("ANALYZE %s", rm_relation_sql(lfirst_oid(lc))));
	}
}

/* one proof each transaction: a scan that lets everybody read and write */
static RmStepResult
finish_apply(RmRun *run)
{
	RmMigration *m = run->m;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};
	char	   *sql;

	rm_state_execute("SELECT to_prove[1] FROM risky_migrations.migration WHERE id = $1",
					 1, types, v, NULL);
	sql = rm_result_text(0, 1);
	rm_lock_relation(&run->locks, m->relid, ShareUpdateExclusiveLock);
	rm_check_owner(m->relid, m->relation);
	if (sql == NULL)
	{
		analyze_where_needed(m);
		rm_rewrite_forget(m);
		return RM_STEP_DONE;
	}
	rm_execute(sql);
	if (rm_is_parted(m))
		rm_mark_parts_proven(m->relid);
	rm_state_execute("UPDATE risky_migrations.migration SET to_prove = to_prove[2:]"
					 " WHERE id = $1", 1, types, v, NULL);
	return RM_STEP_AGAIN;
}

/* the new values, or what was written meanwhile, do not satisfy a foreign key */
static void
finish_explain(RmRun *run, ErrorData *error)
{
	MemoryContext oldcxt;

	if (error->sqlerrcode != ERRCODE_FOREIGN_KEY_VIOLATION)
		return;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	error->hint = psprintf("The type is changed, and the constraint is in force for all that is written, but NOT VALID. Mend such rows, then SELECT rm_resume(%lld).",
						   (long long) run->migration_id);
	MemoryContextSwitchTo(oldcxt);
}

const RmStep rm_step_rewrite_finish = {
	.name = "finish",
	.apply = finish_apply,
	.revert = cut_over_revert,
	.explain = finish_explain,
};
