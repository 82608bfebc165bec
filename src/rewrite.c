/*-------------------------------------------------------------------------
 *
 * rewrite.c
 *	  The method online_rewrite: the table is rewritten beside its users.
 *
 * ALTER TABLE rewrites a table under ACCESS EXCLUSIVE.  Here a second heap, the
 * shadow, is filled with what the table's rows become, while everybody goes on;
 * what changes meanwhile is noted in a log and replayed; and in a transaction of
 * milliseconds the two exchange their files.
 *
 *	begin		shadow and change log, beside everybody; then, in one transaction
 *				under SHARE ROW EXCLUSIVE, which waits out every writer, the trigger
 *				that writes the log, and S0, the set of transactions in progress.
 *	copy		see rewrite_copy.c
 *	index		see rewrite_index.c
 *	catch_up	see rewrite_replay.c
 *	verify		see rewrite_verify.c
 *	cut_over	see rewrite_exchange.c
 *	finish		foreign keys that were carried over unproven are proven; ANALYZE
 *				where there are statistics objects.
 *
 * A partitioned table is rewritten partition by partition, and a table with children
 * (m->by_leaf) one after the other: each that holds rows has
 * a shadow, a log and a row of state of its own, with the steps that are done for it.
 * A step takes one after the other (rm_rewrite_next()); the cut-over takes all at
 * once.  Rows that move from one to another are deleted here and inserted there, for
 * the logs as well.  The tables are compared with the catalogs before the first and
 * after the last one: what has come since is begun, with an S0 of its own.  Partitions get their
 * trigger from above; a child has one for itself, also when it is taken away: it does
 * nothing without a log, and goes in the end.
 *
 * What the shadow must look like is not for us to say: PostgreSQL is asked.  A
 * twin (twin.c) on which the very ALTER has been run tells what the column
 * becomes, which CHECK constraints the new rows have to satisfy and how the
 * indexes are defined.  The catalogs of the table itself are changed by the
 * ordinary ALTER TABLE, in the cut-over, on the emptied table.
 *
 * Which row versions does the copy take, and which are in the log?  At begin
 * nobody was writing (the lock), so each version that was there then is of a
 * transaction that had ended; and each that is made later fires the trigger.
 * A version's xmin tells one from the other by S0.  So each row is copied at
 * most once, and whatever the copy leaves out, or copies before it changes, is
 * in the log.
 *
 * Who may be under way: readers and writers of any isolation level, at any time,
 * but not across the short lock of begin and cut_over if they have touched the
 * table.  What a crash leaves between two commits: the state row, the row of
 * risky_migrations.rewrite and the shadow, written in the same transactions; the
 * copy appends pages of its own and knows those that were committed.
 *
 * Easy to get wrong:
 *
 *	A trigger that was switched off for a moment has missed changes that nothing
 *	tells of.  Its row in pg_trigger is watched, and where it has changed all
 *	begins again, with a new S0.
 *
 *	An ALTER TABLE that rewrites gives rows other values and another xmin, and
 *	fires no trigger.  So whenever the table has other storage, also by VACUUM FULL,
 *	CLUSTER or TRUNCATE, all begins again, with a new S0.
 *
 *	No lock is kept between transactions, on the shadow neither: whatever comes
 *	in between is found out by looking.
 *
 *	Shadow and log are members of the extension.  pg_dump passes over them, which could
 *	not even read a shadow to its end (rewrite_copy.c), and whose tables nobody could
 *	use.  DROP TABLE of the user's table leaves them for rm_rollback().
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/reloptions.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/catalog.h"
#include "catalog/dependency.h"
#include "catalog/heap.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/objectaddress.h"
#include "catalog/partition.h"
#include "catalog/pg_am.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_type.h"
#include "catalog/toasting.h"
#include "commands/extension.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "compat.h"
#include "crew.h"
#include "dependents.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "leaves.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "optimizer/optimizer.h"
#include "rewrite.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "storage/lmgr.h"
#include "twin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/* a migration may not last longer than xids can be told apart */
#define MAX_XIDS UINT64CONST(1000000000)

static void drop_tables(const RmMigration *m, const RmRewrite *rw);

/* what takes the place of that table, or index */
char *
rm_rewrite_shadow_name(int64 id, Oid original)
{
	return psprintf("shadow_%lld_%u", (long long) id, original);
}

/* the shadow's index that takes the place of that one; InvalidOid if it has not been built */
Oid
rm_rewrite_shadow_index(const RmRewrite *rw, Oid original)
{
	return get_relname_relid(rm_rewrite_shadow_name(rw->id, original),
							 get_namespace_oid(RM_SCHEMA, false));
}

/* the shadow's index that tells its rows apart */
Oid
rm_rewrite_shadow_key(const RmRewrite *rw)
{
	Oid			index = rm_rewrite_shadow_index(rw, rw->key_index);

	if (!OidIsValid(index))
		elog(ERROR, "a shadow of migration %lld has no index for its key", (long long) rw->id);
	return index;
}

/* is a column that changes part of the key? */
bool
rm_rewrite_key_converts(const RmRewrite *rw)
{
	Relation	index = index_open(rw->key_index, AccessShareLock);
	bool		converts = false;

	for (int i = 0; i < IndexRelationGetNumberOfKeyAttributes(index); i++)
		converts |= list_member_int(rw->attnums, index->rd_index->indkey.values[i]);
	index_close(index, NoLock);
	return converts;
}

/* is there more than one table that holds rows, each of which has steps of its own? */
bool
rm_rewrite_by_leaf(const RmMigration *m)
{
	return rm_is_parted(m) || m->by_leaf;
}

static char *
log_trigger_name(const RmMigration *m)
{
	return psprintf("~rm_log_%lld", (long long) m->id);
}

/* InvalidOid if there is no such relation */
static Oid
relfilenode_of(Oid relid)
{
	HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	Oid			relfilenode;

	if (!HeapTupleIsValid(tup))
		return InvalidOid;
	relfilenode = ((Form_pg_class) GETSTRUCT(tup))->relfilenode;
	ReleaseSysCache(tup);
	return relfilenode;
}

/*-------------------------------------------------------------------------
 * Its rows of state
 *-------------------------------------------------------------------------
 */

#define REWRITE_COLUMNS "shadow::int8, log::int8, key_index::int8, trigger_mark, ground," \
	" s0_next, s0_xmin, s0_running, s0_overflowed::int::int8, rows_failed," \
	" shadow_storage::int8, relid::int8, steps_done::int8, relfilenode::int8," \
	" end_block, fingerprint, analyzed"

/* the i-th that was found */
static RmRewrite *
read_rewrite(const RmMigration *m, uint64 i)
{
	RmRewrite  *rw = palloc0(sizeof(RmRewrite));
	Datum	   *xids;

	rw->id = m->id;
	rw->shadow = rm_result_int64(i, 1);
	rw->log = rm_result_int64(i, 2);
	rw->key_index = rm_result_int64(i, 3);
	rw->trigger_mark = rm_result_int64(i, 4);
	rw->ground = rm_result_text(i, 5);
	rw->next_xid = (uint64) rm_result_int64(i, 6);
	rw->xmin = (TransactionId) rm_result_int64(i, 7);
	deconstruct_array(DatumGetArrayTypeP(rm_result_datum(i, 8)), INT8OID, sizeof(int64),
					  FLOAT8PASSBYVAL, TYPALIGN_DOUBLE, &xids, NULL, &rw->nrunning);
	rw->running = palloc(sizeof(TransactionId) * Max(rw->nrunning, 1));
	for (int x = 0; x < rw->nrunning; x++)
		rw->running[x] = (TransactionId) DatumGetInt64(xids[x]);
	rw->overflowed = rm_result_int64(i, 9) != 0;
	rw->rows_failed = rm_result_int64(i, 10);
	rw->shadow_storage = rm_result_int64(i, 11);
	rw->relid = rm_result_int64(i, 12);
	rw->steps_done = rm_result_int64(i, 13);
	rw->relfilenode = rm_result_int64(i, 14);
	rw->end_block = rm_result_int64(i, 15);
	rw->fingerprint = rm_result_text(i, 16);
	rw->analyzed = (TimestampTz) rm_result_int64(i, 17);
	return rw;
}

/* those that were found */
static List *
read_rewrites(const RmMigration *m)
{
	List	   *list = NIL;
	ListCell   *lc;

	for (uint64 i = 0; i < SPI_processed; i++)
		list = lappend(list, read_rewrite(m, i));
	foreach(lc, list)
	{
		RmRewrite  *rw = lfirst(lc);

		rw->attnums = rm_attnums_of(m->columns, rw->relid);
	}
	return list;
}

/* of all tables, by OID; needs SPI */
List *
rm_rewrite_load_all(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("SELECT " REWRITE_COLUMNS " FROM risky_migrations.rewrite"
					 " WHERE migration_id = $1 ORDER BY relid", 1, types, v, NULL);
	return read_rewrites(m);
}

/* of that one; NULL if nothing has begun */
RmRewrite *
rm_rewrite_load(const RmMigration *m, Oid relid)
{
	Oid			types[] = {INT8OID, OIDOID};
	Datum		v[] = {Int64GetDatum(m->id), ObjectIdGetDatum(relid)};
	List	   *list;

	rm_state_execute("SELECT " REWRITE_COLUMNS " FROM risky_migrations.rewrite"
					 " WHERE migration_id = $1 AND relid = $2", 2, types, v, NULL);
	list = read_rewrites(m);
	return list == NIL ? NULL : linitial(list);
}

/*
 * All of them, compared with the catalogs: those of tables that hold the table's rows;
 * in *gone those of others; in *missing the tables, by OID, that have none yet.
 */
static List *
match_tables(const RmMigration *m, List **gone, List **missing)
{
	List	   *leaves = rm_tree_leaves(m->relid);
	List	   *list = NIL;
	ListCell   *lc;
	int			i = 0;

	*gone = *missing = NIL;
	list_sort(leaves, list_oid_cmp);
	foreach(lc, rm_rewrite_load_all(m))
	{
		RmRewrite  *rw = lfirst(lc);

		while (i < list_length(leaves) && list_nth_oid(leaves, i) < rw->relid)
			*missing = lappend_oid(*missing, list_nth_oid(leaves, i++));
		if (i < list_length(leaves) && list_nth_oid(leaves, i) == rw->relid)
		{
			list = lappend(list, rw);
			i++;
		}
		else
			*gone = lappend(*gone, rw);
	}
	while (i < list_length(leaves))
		*missing = lappend_oid(*missing, list_nth_oid(leaves, i++));
	return list;
}

/* writes what can change while it runs */
void
rm_rewrite_save(const RmRewrite *rw)
{
	Oid			types[] = {INT8OID, OIDOID, INT8OID, OIDOID, INT8OID, TEXTOID, TIMESTAMPTZOID};
	Datum		v[] = {Int64GetDatum(rw->id), ObjectIdGetDatum(rw->relid),
		Int64GetDatum(rw->rows_failed), ObjectIdGetDatum(rw->shadow_storage),
		Int64GetDatum(rw->steps_done),
		rw->fingerprint ? CStringGetTextDatum(rw->fingerprint) : (Datum) 0,
	TimestampTzGetDatum(rw->analyzed)};
	char		n[] = "       ";

	n[5] = rw->fingerprint ? ' ' : 'n';
	n[6] = rw->analyzed ? ' ' : 'n';
	rm_state_execute("UPDATE risky_migrations.rewrite SET rows_failed = $3,"
					 " shadow_storage = $4, steps_done = $5, fingerprint = $6, analyzed = $7"
					 " WHERE migration_id = $1 AND relid = $2",
					 lengthof(types), types, v, n);
}

/* the row without S0 */
static void
insert_rewrite(const RmRewrite *rw)
{
	Oid			types[] = {INT8OID, OIDOID, OIDOID, OIDOID, OIDOID, TEXTOID, OIDOID};
	Datum		v[] = {Int64GetDatum(rw->id), ObjectIdGetDatum(rw->relid),
		ObjectIdGetDatum(rw->shadow), ObjectIdGetDatum(rw->log),
		ObjectIdGetDatum(rw->key_index), CStringGetTextDatum(rw->ground),
	ObjectIdGetDatum(rw->shadow_storage)};

	rm_state_execute("INSERT INTO risky_migrations.rewrite (migration_id, relid, shadow, log,"
					 " key_index, ground, shadow_storage) VALUES ($1, $2, $3, $4, $5, $6, $7)",
					 lengthof(types), types, v, NULL);
}

/* S0, the triggers that have noted everything since, and the storage of that time */
static void
save_s0(const RmRewrite *rw)
{
	Oid			types[] = {INT8OID, OIDOID, INT8OID, INT8OID, INT8OID, INT8ARRAYOID, BOOLOID,
	OIDOID, INT8OID};
	Datum	   *xids = palloc(sizeof(Datum) * Max(rw->nrunning, 1));
	Datum		v[lengthof(types)];

	for (int x = 0; x < rw->nrunning; x++)
		xids[x] = Int64GetDatum((int64) rw->running[x]);
	v[0] = Int64GetDatum(rw->id);
	v[1] = ObjectIdGetDatum(rw->relid);
	v[2] = Int64GetDatum(rw->trigger_mark);
	v[3] = Int64GetDatum((int64) rw->next_xid);
	v[4] = Int64GetDatum((int64) rw->xmin);
	v[5] = rm_int64_array(xids, rw->nrunning);
	v[6] = BoolGetDatum(rw->overflowed);
	v[7] = ObjectIdGetDatum(rw->relfilenode);
	v[8] = Int64GetDatum(rw->end_block);
	rm_state_execute("UPDATE risky_migrations.rewrite SET trigger_mark = $3, s0_next = $4,"
					 " s0_xmin = $5, s0_running = $6, s0_overflowed = $7, relfilenode = $8,"
					 " end_block = $9 WHERE migration_id = $1 AND relid = $2",
					 lengthof(types), types, v, NULL);
}

/*-------------------------------------------------------------------------
 * What is refused
 *-------------------------------------------------------------------------
 */

static void
refuse(Relation rel, const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("online_rewrite cannot change table \"%s\"",
					RelationGetRelationName(rel)),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

static void
refuse_kind(Relation rel)
{
	if (rel->rd_rel->relispartition)
		refuse(rel, "It is a partition.", "Name the partitioned table that it belongs to.");
	if (rel->rd_rel->relkind != RELKIND_RELATION && rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		refuse(rel, "It is not an ordinary table.", "Name an ordinary table.");
	if (IsCatalogRelation(rel) || RelationGetNamespace(rel) == get_namespace_oid(RM_SCHEMA, false))
		refuse(rel, "It is a system catalog, or belongs to this extension.",
			   "Name a table of your own.");
	if (rel->rd_rel->relrewrite != InvalidOid)
		refuse(rel, "It is a transient table.", "Name a table of your own.");
}

/* of what holds rows */
static void
refuse_storage(Relation rel)
{
	if (rel->rd_rel->relam != HEAP_TABLE_AM_OID)
		refuse(rel, "Its table access method is not heap.",
			   "Only tables of the access method heap can be rewritten.");
	if (RelationUsesLocalBuffers(rel))
		refuse(rel, "It is a temporary table.",
			   "Nobody else can be waiting for it: use ALTER TABLE.");
}

/* where online_rewrite cannot do it: three_step changes a column, and only one */
static const char *
hint_three_step(int ncolumns)
{
	return ncolumns == 1 ? "Use the method three_step" :
		"Change one column after the other, with the method three_step";
}

static void
refuse_columns(Relation rel, List *attnums)
{
	TupleDesc	desc = RelationGetDescr(rel);
	ListCell   *lc;

	foreach(lc, attnums)
		if (TupleDescAttr(desc, lfirst_int(lc) - 1)->attgenerated)
			refuse(rel, psprintf("The column \"%s\" is generated.",
								 NameStr(TupleDescAttr(desc, lfirst_int(lc) - 1)->attname)),
				   "Change the columns that it is generated from.");
	for (int i = 0; i < desc->natts; i++)
		if (TupleDescAttr(desc, i)->attgenerated == 'v')
			refuse(rel, psprintf("The column \"%s\" is a virtual generated column.",
								 NameStr(TupleDescAttr(desc, i)->attname)),
				   attnums == NIL ? "Drop that column, and add it again afterwards." :
				   psprintf("%s.", hint_three_step(list_length(attnums))));
}

/* do the key columns of that index tell all rows apart? */
static bool
is_key_index(Relation rel, Relation index)
{
	Form_pg_index form = index->rd_index;

	if (!form->indisunique || !form->indisvalid || index->rd_rel->relam != BTREE_AM_OID ||
		RelationGetIndexPredicate(index) != NIL || RelationGetIndexExpressions(index) != NIL)
		return false;
	for (int i = 0; i < form->indnkeyatts; i++)
	{
		AttrNumber	attnum = form->indkey.values[i];

		if (attnum <= 0 || !rm_attribute_not_null(RelationGetDescr(rel), attnum - 1))
			return false;
	}
	return true;
}

/*
 * The index by which rows are told apart: of the primary key, else the one with
 * the fewest columns.  InvalidOid if there is none.
 */
static Oid
find_key_index(Relation rel)
{
	Oid			best = InvalidOid;
	int			best_columns = INDEX_MAX_KEYS + 1;
	ListCell   *lc;

	foreach(lc, RelationGetIndexList(rel))
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		int			columns = index->rd_index->indisprimary ? 0 : index->rd_index->indnkeyatts;

		if (is_key_index(rel, index) && columns < best_columns)
		{
			best = lfirst_oid(lc);
			best_columns = columns;
		}
		index_close(index, NoLock);
	}
	return best;
}

/*
 * The log has the key alone.  Where columns that change are part of it, the new key
 * must be told by the old one.
 */
static void
refuse_key(Relation rel, Oid root, List *columns)
{
	Oid			index_oid = find_key_index(rel);
	Relation	index;
	Bitmapset  *key = NULL;
	Bitmapset  *reads = NULL;
	ListCell   *lc;

	if (!OidIsValid(index_oid))
		refuse(rel, "It has no primary key, and no other unique index on columns that are NOT NULL.",
			   columns == NIL ? "Add a primary key." :
			   psprintf("%s, or add a primary key.", hint_three_step(list_length(columns))));
	index = index_open(index_oid, AccessShareLock);
	for (int i = 0; i < index->rd_index->indnkeyatts; i++)
		key = bms_add_member(key, index->rd_index->indkey.values[i] - FirstLowInvalidHeapAttributeNumber);
	index_close(index, NoLock);
	foreach(lc, columns)
	{
		const RmConversionDef *c = lfirst(lc);
		AttrNumber	attnum = rm_leaf_attnum(root, c->attnum, RelationGetRelid(rel));

		if (bms_is_member(attnum - FirstLowInvalidHeapAttributeNumber, key))
			pull_varattnos(rm_leaf_expression(stringToNode(c->tree), root, rel), 1, &reads);
	}
	if (!bms_is_subset(reads, key))
		refuse(rel, list_length(columns) == 1 ?
			   "The column is part of its key, and the expression reads columns that are not." :
			   "Columns are part of its key, and their expressions read columns that are not.",
			   psprintf("%s.", hint_three_step(list_length(columns))));
}

/* what hangs on the columns and ALTER TABLE would refuse, or we could not make again */
void
rm_rewrite_refuse_obstacles(Relation rel, List *columns)
{
	Oid			types[] = {OIDOID, INT2ARRAYOID, OIDARRAYOID};
	Datum		v[3];
	Datum	   *new_types = palloc(sizeof(Datum) * Max(list_length(columns), 1));
	ListCell   *lc;

	foreach(lc, columns)
		new_types[foreach_current_index(lc)] = ObjectIdGetDatum(((RmConversionDef *) lfirst(lc))->type);
	v[0] = ObjectIdGetDatum(RelationGetRelid(rel));
	v[1] = rm_attnum_array(rm_attnums_of(columns, RelationGetRelid(rel)));
	v[2] = PointerGetDatum(construct_array(new_types, list_length(columns), OIDOID, sizeof(Oid), true,
										   TYPALIGN_INT));
	rm_catalog_query("SELECT kind, name, reason, hint FROM risky_migrations.rewrite_obstacles($1, $2, $3)",
					 3, types, v);
	rm_refuse_obstacles(rm_method_online_rewrite.name, RelationGetRelid(rel), rm_columns_text(columns));
}

/* of a table that holds rows of root: itself, or a partition */
static void
refuse_table(Relation rel, Oid root, List *columns)
{
	refuse_storage(rel);
	refuse_columns(rel, rm_attnums_of(columns, RelationGetRelid(rel)));
	refuse_key(rel, root, columns);
}

/* the same of one below it, a partition or a child */
static void
refuse_leaf(Relation part, Oid root, List *columns)
{
	HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(root));
	const char *what = part->rd_rel->relispartition ? "is a partition of" : "inherits from";
	Form_pg_class form;

	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for relation %u", root);
	form = (Form_pg_class) GETSTRUCT(tup);
	if (part->rd_rel->relowner != form->relowner)
		refuse(part, psprintf("It %s \"%s\", and has another owner.", what,
							  NameStr(form->relname)),
			   "Give both the same owner.");
	if (part->rd_rel->relkind == RELKIND_RELATION)
		refuse_table(part, root, columns);
	else if (part->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		refuse(part, psprintf("It %s \"%s\", and is no ordinary table.", what,
							  NameStr(form->relname)),
			   "Detach it first; its column is changed where it is stored.");
	ReleaseSysCache(tup);
}

/* and of all of them; before anything begins their locks may be waited for */
static void
refuse_leaves(Relation root, List *columns)
{
	ListCell   *lc;

	foreach(lc, rm_lock_below(root))
	{
		Relation	part = relation_open(lfirst_oid(lc), NoLock);

		refuse_leaf(part, RelationGetRelid(root), columns);
		relation_close(part, NoLock);
	}
}

/*
 * Refuses every table and column (of RmConversionDef) that online_rewrite cannot
 * change, before anything is changed.  The caller holds a lock on rel.  Needs SPI.
 */
void
rm_rewrite_refuse(Relation rel, List *columns)
{
	refuse_kind(rel);
	if (rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		refuse_table(rel, RelationGetRelid(rel), columns);
	refuse_leaves(rel, columns);
	rm_rewrite_refuse_obstacles(rel, columns);
}

/*-------------------------------------------------------------------------
 * How rows are stored
 *-------------------------------------------------------------------------
 */

/* reloptions of a relation as they are in pg_class; (Datum) 0 if it has none, or is InvalidOid */
static Datum
reloptions_of(Oid relid)
{
	HeapTuple	tup;
	Datum		options;
	bool		isnull;

	if (!OidIsValid(relid))
		return (Datum) 0;
	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for relation %u", relid);
	options = SysCacheGetAttr(RELOID, tup, Anum_pg_class_reloptions, &isnull);
	options = isnull ? (Datum) 0 : datumCopy(options, false, -1);
	ReleaseSysCache(tup);
	return options;
}

static void
set_reloptions(Oid relid, Datum options)
{
	Relation	pg_class = table_open(RelationRelationId, RowExclusiveLock);
	HeapTuple	old = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	HeapTuple	tup;
	Datum		values[Natts_pg_class] = {0};
	bool		nulls[Natts_pg_class] = {0};
	bool		replaces[Natts_pg_class] = {0};

	values[Anum_pg_class_reloptions - 1] = options;
	nulls[Anum_pg_class_reloptions - 1] = options == (Datum) 0;
	replaces[Anum_pg_class_reloptions - 1] = true;
	tup = heap_modify_tuple(old, RelationGetDescr(pg_class), values, nulls, replaces);
	CatalogTupleUpdate(pg_class, &tup->t_self, tup);
	ReleaseSysCache(old);
	table_close(pg_class, RowExclusiveLock);
}

/* for a table of ours, if it needs one, with the options that rel's has */
static void
create_toast(Oid relid, Relation rel)
{
	NewHeapCreateToastTable(relid, reloptions_of(rel->rd_rel->reltoastrelid), AccessExclusiveLock,
							RelationGetRelid(rel));
}

/*
 * Does the shadow store a column as the table does?  One that changes is stored as its new
 * type is.
 */
static bool
stores_column_alike(const RmRewrite *rw, Relation rel, Relation shadow, AttrNumber attnum)
{
	Form_pg_attribute a = TupleDescAttr(RelationGetDescr(rel), attnum - 1);
	Form_pg_attribute b = TupleDescAttr(RelationGetDescr(shadow), attnum - 1);

	return a->attisdropped || list_member_int(rw->attnums, attnum) ||
		(a->attstorage == b->attstorage && a->attcompression == b->attcompression);
}

/* what ALTER TABLE does not keep: the TOAST table's options, and itself, where none is needed */
bool
rm_rewrite_has_right_toast(Relation rel, Relation shadow)
{
	Oid			toast = shadow->rd_rel->reltoastrelid;
	Datum		wanted;
	Datum		options;

	if (OidIsValid(toast) != table_relation_needs_toast_table(shadow))
		return false;
	if (!OidIsValid(toast))
		return true;
	wanted = reloptions_of(rel->rd_rel->reltoastrelid);
	options = reloptions_of(toast);
	if (wanted == (Datum) 0 || options == (Datum) 0)
		return wanted == options;
	return datum_image_eq(wanted, options, false, -1);
}

/*
 * Does the shadow store its rows as the table does now?  Not after ALTER TABLE ... SET
 * STORAGE, SET COMPRESSION or SET (toast. ...).  The caller holds a lock on rel.
 */
static bool
is_stored_alike(const RmRewrite *rw, Relation rel)
{
	Relation	shadow = table_open(rw->shadow, AccessShareLock);
	bool		alike = rm_rewrite_has_right_toast(rel, shadow);

	for (AttrNumber attnum = 1; alike && attnum <= RelationGetDescr(rel)->natts; attnum++)
		alike = stores_column_alike(rw, rel, shadow, attnum);
	table_close(shadow, AccessShareLock);
	return alike;
}

/* the shadow's columns; what it has already stays as it is, as it does in the table */
static void
store_columns_alike(const RmRewrite *rw, Relation rel)
{
	Relation	shadow = table_open(rw->shadow, NoLock);
	Relation	pg_attribute = table_open(AttributeRelationId, RowExclusiveLock);

	for (AttrNumber attnum = 1; attnum <= RelationGetDescr(rel)->natts; attnum++)
	{
		Form_pg_attribute wanted = TupleDescAttr(RelationGetDescr(rel), attnum - 1);
		HeapTuple	tup;

		if (stores_column_alike(rw, rel, shadow, attnum))
			continue;
		tup = SearchSysCacheCopyAttNum(rw->shadow, attnum);
		((Form_pg_attribute) GETSTRUCT(tup))->attstorage = wanted->attstorage;
		((Form_pg_attribute) GETSTRUCT(tup))->attcompression = wanted->attcompression;
		CatalogTupleUpdate(pg_attribute, &tup->t_self, tup);
		heap_freetuple(tup);
	}
	table_close(pg_attribute, RowExclusiveLock);
	table_close(shadow, NoLock);
	CommandCounterIncrement();
}

/*
 * With the table's lock held nothing is waited for: helpers are at work on it, or a VACUUM,
 * and this transaction is tried again.
 */
static void
lock_ours(Oid relid)
{
	if (!ConditionalLockRelationOid(relid, AccessExclusiveLock))
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("could not obtain lock on relation \"%s\"", get_rel_name(relid))));
}

/*
 * The shadow stores its rows as the table does now, and gets the TOAST table that it
 * needs.  Where it needs none any more there may be values in it: all begins again.
 * Returns what the step returns.
 */
static RmStepResult
store_alike(RmRun *run, RmRewrite *rw, Relation rel)
{
	Relation	shadow;
	Oid			toast;
	bool		needs_toast;

	lock_ours(rw->shadow);
	store_columns_alike(rw, rel);
	shadow = table_open(rw->shadow, NoLock);
	toast = shadow->rd_rel->reltoastrelid;
	needs_toast = table_relation_needs_toast_table(shadow);
	table_close(shadow, NoLock);
	if (OidIsValid(toast) && !needs_toast)
		return rm_rewrite_start_over(run, rw->relid, "it needs no TOAST table any more");
	if (OidIsValid(toast))
	{
		lock_ours(toast);
		set_reloptions(toast, reloptions_of(rel->rd_rel->reltoastrelid));
	}
	else
		create_toast(rw->shadow, rel);
	return RM_STEP_AGAIN;
}

/*-------------------------------------------------------------------------
 * The ground
 *-------------------------------------------------------------------------
 */

/*
 * A mark that changes whenever the log may have missed something: with every
 * DISABLE, ENABLE and re-creation of its trigger, and when the functions of the
 * expression are replaced.  0 if the trigger is not there or not ALWAYS.
 */
static int64
trigger_mark(const RmMigration *m, Oid relid)
{
	Relation	rel = table_open(relid, NoLock);
	bool		found = false;

	for (int i = 0; rel->trigdesc && i < rel->trigdesc->numtriggers; i++)
	{
		Trigger    *t = &rel->trigdesc->triggers[i];

		if (t->tgenabled == TRIGGER_FIRES_ALWAYS && strcmp(t->tgname, log_trigger_name(m)) == 0)
			found = true;
	}
	table_close(rel, NoLock);
	if (!found)
		return 0;
	return (int64) hash_combine64(rm_trigger_row_xmin(relid, log_trigger_name(m)),
								  rm_expression_mark(m));
}

/* see risky_migrations.rewrite_ground() */
static char *
ground_of(Oid relid)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(relid)};

	rm_catalog_query("SELECT risky_migrations.rewrite_ground($1)", 1, types, v);
	return rm_result_text(0, 1);
}

/*
 * What somebody's DDL has changed of that what the shadow was made for: columns,
 * CHECK constraints, persistence.  NULL: nothing.
 */
static const char *
changed_ground(const RmRewrite *rw)
{
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(rw->shadow)) ||
		!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(rw->log)))
		return "The shadow table or the change log has been dropped.";
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(rw->key_index)))
		return "The index of its key has been dropped.";
	if (strcmp(rw->ground, ground_of(rw->relid)) != 0)
		return "Its columns or its CHECK constraints are not what they were.";
	return NULL;
}

/*
 * 55000 if what is changed (a partition begins again instead, see
 * rm_rewrite_stands()), or the migration is too old.  The caller holds a lock on rw's
 * table.
 */
static void
check_ground(RmMigration *m, RmRewrite *rw, const char *what)
{
	rm_check_owner(rw->relid, m->relation);
	if (what)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table %s has been changed while migration %lld was open",
						rm_relation_sql(rw->relid), (long long) m->id),
				 errdetail("%s", what),
				 errhint("Give the migration up with CALL rm_rollback(%lld), and start it again.",
						 (long long) m->id)));
	if (rw->next_xid != 0 &&
		U64FromFullTransactionId(ReadNextFullTransactionId()) - rw->next_xid > MAX_XIDS)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("migration %lld is too old to go on", (long long) m->id),
				 errdetail("More than a billion transactions have begun since it did."),
				 errhint("Give it up with CALL rm_rollback(%lld), and start it again.",
						 (long long) m->id)));
}

/*
 * Why the table has to be begun again: changes may have been missed, or rows were
 * rewritten without one.  NULL if all is well.  The caller holds a lock on rel.
 */
const char *
rm_rewrite_missed(RmMigration *m, RmRewrite *rw, Relation rel)
{
	if (rw->trigger_mark != trigger_mark(m, rw->relid))
		return "the change log was switched off for a while";
	if (rw->relfilenode != rel->rd_rel->relfilenode)
		return "the table has other storage";
	if (rw->shadow_storage != relfilenode_of(rw->shadow))
		return "the shadow table has other storage";
	return NULL;
}

/*
 * The method goes on with the copy, which begins with what "begin" does, when
 * this transaction has committed: for that table, a partition or one of a tree, or
 * for all where there is no other or the partitioned table itself has lost the trigger.
 * What there is stays until then.
 */
RmStepResult
rm_rewrite_start_over(RmRun *run, Oid relid, const char *why)
{
	RmMigration *m = run->m;
	bool		alone = m->by_leaf ||
		(rm_is_parted(m) && rm_trigger_row_xmin(m->relid, log_trigger_name(m)) != InvalidTransactionId);

	if (alone)
		ereport(NOTICE,
				(errmsg("migration %lld begins again with %s %s: %s", (long long) m->id,
						rm_is_parted(m) ? "partition" : "table", rm_relation_sql(relid), why)));
	else
		ereport(NOTICE,
				(errmsg("migration %lld begins again: %s", (long long) m->id, why)));
	m->steps_done = RM_REWRITE_COPY;
	m->phase = RM_BEGIN_ANEW;
	m->leaf = alone ? relid : InvalidOid;
	return RM_STEP_BACK;
}

/*
 * Has a table that stood alone got a child, to which ALTER TABLE would go down?  What
 * cannot be changed is refused before anything is given up.
 */
static const char *
first_child(RmMigration *m, Relation rel)
{
	if (rm_rewrite_by_leaf(m) || list_length(rm_tree(m->relid)) == 1)
		return NULL;
	rm_check_ground(m, rel);	/* a column that was dropped has no number there */
	refuse_leaves(rel, m->columns);
	return "a table inherits from it now";
}

/*
 * Is everything as "begin" has left it?  If not, *result is what the step
 * returns.  A partition that was detached and attached again has CHECK constraints
 * that are not the same ones any more, so it is no error there.  The caller holds a
 * lock on rel, rw's table.
 */
bool
rm_rewrite_stands(RmRun *run, RmRewrite *rw, Relation rel, RmStepResult *result)
{
	const char *missed;
	const char *changed = changed_ground(rw);

	if (changed && rw->relid != run->m->relid)
	{
		*result = rm_rewrite_start_over(run, rw->relid, "it has been changed");
		return false;
	}
	check_ground(run->m, rw, changed);
	missed = rm_rewrite_missed(run->m, rw, rel);
	if (missed == NULL)
		missed = first_child(run->m, rel);
	if (missed)
		*result = rm_rewrite_start_over(run, rw->relid, missed);
	else if (!is_stored_alike(rw, rel))
		*result = store_alike(run, rw, rel);
	else
		return true;
	return false;
}

/*-------------------------------------------------------------------------
 * One table after the other
 *-------------------------------------------------------------------------
 */

/* an earlier step comes next, and what comes after it, for that table */
RmStepResult
rm_rewrite_back_to(RmRun *run, RmRewrite *rw, RmRewriteStep step)
{
	rw->steps_done = Min(rw->steps_done, step);
	rm_rewrite_save(rw);
	/* the cut-over's last rounds do not look at what was verified before */
	rm_chunks_unverify(rw->shadow);
	run->m->steps_done = step;
	run->m->phase = 0;
	run->m->leaf = InvalidOid;
	return RM_STEP_BACK;
}

/*
 * All tables that hold the rows, compared with the catalogs: what is no partition
 * any more is forgotten; if there is a new one, that is begun first: false, and
 * *result is what the step returns.
 */
bool
rm_rewrite_all(RmRun *run, List **list, RmStepResult *result)
{
	RmMigration *m = run->m;
	List	   *gone;
	List	   *missing;
	ListCell   *lc;

	*list = match_tables(m, &gone, &missing);
	foreach(lc, gone)
	{
		RmRewrite  *rw = lfirst(lc);

		/* if a VACUUM is at work on it, say, then at another look, "finish" at the latest */
		if (ConditionalLockRelationOid(rw->shadow, AccessExclusiveLock) &&
			ConditionalLockRelationOid(rw->log, AccessExclusiveLock))
			drop_tables(m, rw);
	}
	if (missing == NIL)
		return true;
	if (!rm_rewrite_by_leaf(m))
	{
		Relation	rel;

		rm_lock_relation(&run->locks, m->relid, AccessShareLock);
		rel = table_open(m->relid, NoLock);
		(void) first_child(m, rel);
		table_close(rel, NoLock);
	}
	*result = rm_rewrite_start_over(run, linitial_oid(missing), rm_rewrite_by_leaf(m) ?
									"it has come since" : "a table inherits from it now");
	return false;
}

/* the next of the tables that were found by the last look at all; InvalidOid: look again */
static Oid
next_listed(RmRun *run)
{
	Oid			relid;

	if (run->leaves == NIL)
		return InvalidOid;
	relid = llast_oid(run->leaves);
	run->leaves = list_delete_last(run->leaves);
	return relid;
}

/* these are to come, for next_listed() */
static void
list_leaves(RmRun *run, List *relids)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(run->cxt);

	list_free(run->leaves);
	run->leaves = NIL;
	for (int i = list_length(relids) - 1; i >= 0; i--)
		run->leaves = lappend_oid(run->leaves, list_nth_oid(relids, i));
	MemoryContextSwitchTo(oldcxt);
}

/* the step goes on with that table */
static RmStepResult
take_table(RmMigration *m, const RmRewrite *rw)
{
	m->phase = 0;
	m->leaf = rw->relid;
	m->relfilenode = rw->relfilenode;
	m->next_block = 0;
	m->end_block = rw->end_block;
	return RM_STEP_AGAIN;
}

/*
 * Of a partitioned table, or one with children: which one that holds rows comes next?
 * There may be thousands, so all are looked at only before the first and after the
 * last one; what has become of the others meanwhile is seen when they are opened.
 */
static RmStepResult
choose_table(RmRun *run)
{
	RmMigration *m = run->m;
	List	   *list;
	List	   *relids = NIL;
	ListCell   *lc;
	RmStepResult result;
	bool		first = true;
	Oid			relid;

	rm_lock_relation(&run->locks, m->relid, AccessShareLock);
	rm_check_owner(m->relid, m->relation);
	rm_ranges_forget(m);		/* of one that is no partition any more */
	while (OidIsValid(relid = next_listed(run)))
	{
		RmRewrite  *rw = rm_rewrite_load(m, relid);

		if (rw && rw->steps_done == run->step_index)
			return take_table(m, rw);
	}
	if (!rm_rewrite_all(run, &list, &result))
		return result;
	foreach(lc, list)
		first &= ((RmRewrite *) lfirst(lc))->steps_done <= run->step_index;
	foreach(lc, list)
	{
		RmRewrite  *rw = lfirst(lc);

		if (rw->steps_done < run->step_index)
			return rm_rewrite_back_to(run, rw, rw->steps_done);
		if (rw->steps_done == run->step_index)
			relids = lappend_oid(relids, rw->relid);
	}
	if (relids == NIL)
		return RM_STEP_DONE;
	if (first)
		m->rows_done = 0;
	list_leaves(run, relids);
	return take_table(m, rm_rewrite_load(m, next_listed(run)));
}

/*
 * The table, with ACCESS SHARE, on which a step goes on that takes one after the
 * other, and relies on what "begin" has made.  NULL if there is none to go on with:
 * *result is what the step returns.
 */
RmRewrite *
rm_rewrite_next(RmRun *run, Relation *rel, RmStepResult *result)
{
	RmMigration *m = run->m;
	RmRewrite  *rw;

	*result = RM_STEP_AGAIN;
	if (rm_rewrite_by_leaf(m) && !OidIsValid(m->leaf))
	{
		*result = choose_table(run);
		return NULL;
	}
	*rel = rm_leaf_open(run, AccessShareLock);
	if (*rel == NULL)
		return NULL;			/* no partition any more: another is chosen */
	rw = rm_rewrite_load(m, RelationGetRelid(*rel));
	if (rw && rm_rewrite_stands(run, rw, *rel, result))
		return rw;
	if (rw == NULL)
		*result = rm_rewrite_start_over(run, RelationGetRelid(*rel), "nothing is known of it");
	table_close(*rel, NoLock);
	return NULL;
}

/*
 * The same in a helper: the table that run->range is of, with ACCESS SHARE.  NULL
 * if something has changed, of which the runner takes care.
 */
RmRewrite *
rm_rewrite_help(RmRun *run, Relation *rel)
{
	RmMigration *m = run->m;
	RmRewrite  *rw;

	run->pause_ms = RM_LOOK_AT_OTHERS;
	m->leaf = m->by_leaf || run->range.relid != m->relid ? run->range.relid : InvalidOid;
	*rel = rm_leaf_open(run, AccessShareLock);
	if (*rel == NULL)
		return NULL;
	rw = rm_rewrite_load(m, run->range.relid);
	if (rw && rw->steps_done == run->step_index && rw->relfilenode == run->range.relfilenode &&
		changed_ground(rw) == NULL && rm_rewrite_missed(m, rw, *rel) == NULL &&
		is_stored_alike(rw, *rel))
	{
		check_ground(m, rw, NULL);
		run->pause_ms = 0;
		return rw;
	}
	table_close(*rel, NoLock);
	return NULL;
}

/* the step is through with that table */
RmStepResult
rm_rewrite_table_done(RmRun *run, RmRewrite *rw)
{
	RmMigration *m = run->m;

	rw->steps_done = run->step_index + 1;
	rm_rewrite_save(rw);
	m->phase = 0;
	if (!rm_rewrite_by_leaf(m))
		return RM_STEP_DONE;
	m->leaf = InvalidOid;
	return RM_STEP_AGAIN;
}

/* for rm_progress: what was said of the table under way becomes true of all */
void
rm_rewrite_progress(RmRun *run, RmRewrite *rw)
{
	if (rm_rewrite_by_leaf(run->m))
		rm_add_other_leaves(run, rw->relid,
							"SELECT coalesce(sum(end_block) FILTER (WHERE steps_done > $3), 0)::bigint,"
							" coalesce(sum(end_block), 0)::bigint"
							" FROM risky_migrations.rewrite WHERE migration_id = $1 AND relid <> $2");
}

/*-------------------------------------------------------------------------
 * begin
 *-------------------------------------------------------------------------
 */

/* what the twin is asked */
typedef struct Twin
{
	RmMigration *m;
	Oid			relid;			/* of which table */
	List	   *attnums;		/* the columns, there */
	MemoryContext cxt;
	FormData_pg_attribute *atts;	/* what they become */
	List	   *checks;			/* of char *: name and definition, for ALTER TABLE ... ADD */
} Twin;

RmTwin
rm_rewrite_make_twin(RmMigration *m, Oid relid)
{
	/* in one place for all partitions, so that the first one tells whether it may be */
	RmTwin		twin = rm_twin_make(relid, rm_twin_schema(m->relid),
									psprintf("rm_twin_%lld", (long long) m->id),
									psprintf("rm_x_%lld_", (long long) m->id));

	rm_twin_alter(&twin, rm_alter_clauses(m->columns, m->relid, true));
	return twin;
}

static void
ask_twin(void *arg)
{
	Twin	   *t = arg;
	RmTwin		twin = rm_rewrite_make_twin(t->m, t->relid);
	Relation	rel = table_open(twin.relid, NoLock);
	StringInfoData numbers;
	MemoryContext oldcxt;
	ListCell   *lc;

	initStringInfo(&numbers);
	t->atts = MemoryContextAlloc(t->cxt, sizeof(FormData_pg_attribute) * Max(list_length(t->attnums), 1));
	foreach(lc, t->attnums)
	{
		AttrNumber	attnum = get_attnum(twin.relid, get_attname(t->relid, lfirst_int(lc), false));

		t->atts[foreach_current_index(lc)] = *TupleDescAttr(RelationGetDescr(rel), attnum - 1);
		appendStringInfo(&numbers, "%d, ", lfirst_int(lc));
	}
	table_close(rel, NoLock);
	if (t->attnums == NIL)
		return;					/* no constraint is anything to us */
	rm_execute(psprintf("SELECT pg_catalog.quote_ident(n.conname), pg_catalog.pg_get_constraintdef(n.oid)"
						" FROM pg_catalog.pg_constraint n JOIN pg_catalog.pg_constraint o"
						" ON o.conname = n.conname AND o.contype = 'c' AND o.conrelid = %u AND o.convalidated"
						" WHERE n.conrelid = %u AND n.contype = 'c'"
						/* others cannot fail by it; one of the whole row has a 0 here */
						" AND (o.conkey IS NULL OR o.conkey && ARRAY[%s0]::int2[]) ORDER BY n.conname",
						t->relid, twin.relid, numbers.data));
	oldcxt = MemoryContextSwitchTo(t->cxt);
	for (uint64 i = 0; i < SPI_processed; i++)
		t->checks = lappend(t->checks, psprintf("%s %s", rm_result_text(i, 1), rm_result_text(i, 2)));
	MemoryContextSwitchTo(oldcxt);
}

/* the table's columns, in their places, as they will be */
static TupleDesc
shadow_descriptor(Relation rel, const Twin *twin)
{
	TupleDesc	desc = CreateTupleDescCopy(RelationGetDescr(rel));
	ListCell   *lc;

	for (int i = 0; i < desc->natts; i++)
		TupleDescAttr(desc, i)->attnotnull = rm_attribute_not_null(RelationGetDescr(rel), i);
	foreach(lc, twin->attnums)
	{
		Form_pg_attribute mine = TupleDescAttr(desc, lfirst_int(lc) - 1);
		const FormData_pg_attribute *att = &twin->atts[foreach_current_index(lc)];

		mine->atttypid = att->atttypid;
		mine->atttypmod = att->atttypmod;
		mine->attlen = att->attlen;
		mine->attbyval = att->attbyval;
		mine->attalign = att->attalign;
		mine->attstorage = att->attstorage;
		mine->attcompression = att->attcompression;
		mine->attcollation = att->attcollation;
		mine->attndims = att->attndims;
	}
	for (int i = 0; i < desc->natts; i++)
		rm_attribute_changed(desc, i);
	return desc;
}

/*
 * Makes a table of ours a member of the extension, as the tables of state are.  It can
 * depend on the user's table no more, then: DROP TABLE would have to drop the extension.
 */
static void
make_member(Oid relid)
{
	ObjectAddress table;
	ObjectAddress extension;

	ObjectAddressSet(table, RelationRelationId, relid);
	ObjectAddressSet(extension, ExtensionRelationId, get_extension_oid("risky_migrations", false));
	recordDependencyOn(&table, &extension, DEPENDENCY_EXTENSION);
}

/* a shadow or a log for rel, which is told by relrewrite; see rewrite_log.c */
Oid
rm_rewrite_create_table(const char *name, Relation rel, Oid tablespace, TupleDesc desc, Datum options)
{
	Oid			relid = heap_create_with_catalog(name, get_namespace_oid(RM_SCHEMA, false),
												 tablespace, InvalidOid, InvalidOid, InvalidOid,
												 rel->rd_rel->relowner, HEAP_TABLE_AM_OID, desc, NIL,
												 RELKIND_RELATION, rel->rd_rel->relpersistence,
												 false, false, ONCOMMIT_NOOP, options, false,
												 true, true, RelationGetRelid(rel), NULL);

	CommandCounterIncrement();
	create_toast(relid, rel);
	make_member(relid);
	return relid;
}

static Oid
create_shadow(int64 id, Relation rel, Twin *twin)
{
	Oid			relid = RelationGetRelid(rel);
	Datum		options = transformRelOptions(reloptions_of(relid),
											  list_make1(makeDefElem("autovacuum_enabled",
																	 (Node *) makeString("false"), -1)),
											  NULL, NULL, false, false);
	Oid			shadow;
	ListCell   *lc;

	shadow = rm_rewrite_create_table(rm_rewrite_shadow_name(id, relid), rel, rel->rd_rel->reltablespace,
									 shadow_descriptor(rel, twin), options);
	foreach(lc, twin->checks)
		rm_execute(psprintf("ALTER TABLE " RM_SCHEMA ".%s ADD CONSTRAINT %s", rm_rewrite_shadow_name(id, relid),
							(char *) lfirst(lc)));
	return shadow;
}

/* of a partitioned table: every partition gets one, also those to come */
static void
create_trigger(RmMigration *m, Oid relid)
{
	const char *log = quote_identifier(log_trigger_name(m));

	rm_execute(psprintf("CREATE OR REPLACE TRIGGER %s AFTER INSERT OR UPDATE OR DELETE ON %s"
						" FOR EACH ROW EXECUTE FUNCTION " RM_SCHEMA ".log_change(%lld)",
						log, rm_relation_sql(relid), (long long) m->id));
	rm_execute(psprintf("ALTER TABLE %s%s ENABLE ALWAYS TRIGGER %s", rm_is_parted(m) ? "" : "ONLY ",
						rm_relation_sql(relid), log));
	CommandCounterIncrement();
}

/* the trigger of one table below the top: a partition has got it, and a child has not */
static void
arm_leaf(RmMigration *m, Oid relid)
{
	if (!rm_is_parted(m))
	{
		create_trigger(m, relid);
		return;
	}
	rm_execute(psprintf("ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %s",
						rm_relation_sql(relid),
						quote_identifier(log_trigger_name(m))));
	CommandCounterIncrement();
}

static int
compare_xids(const void *a, const void *b)
{
	TransactionId x = *(const TransactionId *) a;
	TransactionId y = *(const TransactionId *) b;

	return x < y ? -1 : x > y;
}

/* S0: who is in progress now, subtransactions included where they are known */
static void
take_s0(RmRewrite *rw)
{
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	FullTransactionId next = ReadNextFullTransactionId();

	rw->next_xid = U64FromFullTransactionId(next) -
		(uint32) (XidFromFullTransactionId(next) - snapshot->xmax);
	rw->xmin = snapshot->xmin;
	rw->overflowed = snapshot->suboverflowed;
	rw->nrunning = snapshot->xcnt + snapshot->subxcnt;
	rw->running = palloc(sizeof(TransactionId) * Max(rw->nrunning, 1));
	if (snapshot->xcnt > 0)
		memcpy(rw->running, snapshot->xip, sizeof(TransactionId) * snapshot->xcnt);
	if (snapshot->subxcnt > 0)
		memcpy(rw->running + snapshot->xcnt, snapshot->subxip,
			   sizeof(TransactionId) * snapshot->subxcnt);
	qsort(rw->running, rw->nrunning, sizeof(TransactionId), compare_xids);
	UnregisterSnapshot(snapshot);
}

static void
drop_relation(Oid relid)
{
	ObjectAddress object;

	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
		return;
	LockRelationOid(relid, AccessExclusiveLock);
	/* nor is it ours, if somebody else's has got its OID since */
	if (get_rel_namespace(relid) != get_namespace_oid(RM_SCHEMA, false))
		return;
	ObjectAddressSet(object, RelationRelationId, relid);
	performDeletion(&object, DROP_RESTRICT, PERFORM_DELETION_INTERNAL | PERFORM_DELETION_SKIP_EXTENSIONS);
}

/* shadow and log go; what is gone already is no error */
void
rm_rewrite_drop(const RmRewrite *rw)
{
	drop_relation(rw->shadow);
	drop_relation(rw->log);
}

/*
 * The tables that have a trigger of ours for themselves, also such as do not inherit
 * from the table any more; no locks.  One that has got another owner meanwhile keeps it,
 * for it is not ours to lock or change: without a log the trigger does nothing.
 * Needs SPI.
 */
List *
rm_rewrite_tables_with_trigger(const RmMigration *m)
{
	List	   *relids = NIL;

	rm_execute(psprintf("SELECT g.tgrelid FROM pg_catalog.pg_trigger g"
						" JOIN pg_catalog.pg_class c ON c.oid = g.tgrelid"
						" WHERE g.tgname = %s AND g.tgparentid = 0"
						" AND g.tgfoid = '" RM_SCHEMA ".log_change'::pg_catalog.regproc"
						" AND pg_catalog.pg_has_role(c.relowner, 'USAGE') ORDER BY 1",
						quote_literal_cstr(log_trigger_name(m))));
	for (uint64 i = 0; i < SPI_processed; i++)
		relids = lappend_oid(relids, DatumGetObjectId(rm_result_datum(i, 1)));
	return relids;
}

/* the triggers that write the logs, likewise; the caller holds ACCESS EXCLUSIVE on these tables */
void
rm_rewrite_drop_trigger(const RmMigration *m)
{
	ListCell   *lc;

	foreach(lc, rm_rewrite_tables_with_trigger(m))
		rm_execute(psprintf("DROP TRIGGER IF EXISTS %s ON %s",
							quote_identifier(log_trigger_name(m)), rm_relation_sql(lfirst_oid(lc))));
}

/* shadow and log, and with them their row of state */
static void
drop_tables(const RmMigration *m, const RmRewrite *rw)
{
	Oid			types[] = {INT8OID, OIDOID};
	Datum		v[] = {Int64GetDatum(m->id), ObjectIdGetDatum(rw->relid)};

	rm_rewrite_drop(rw);
	rm_chunks_forget(rw->shadow);
	rm_state_execute("DELETE FROM risky_migrations.rewrite WHERE migration_id = $1 AND relid = $2",
					 2, types, v, NULL);
}

/* all shadows and logs of the migration */
void
rm_rewrite_forget(const RmMigration *m)
{
	ListCell   *lc;

	foreach(lc, rm_rewrite_load_all(m))
		drop_tables(m, lfirst(lc));
}

static List *
add_if_there(List *list, Oid relid)
{
	return SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)) ? list_append_unique_oid(list, relid) : list;
}

/*
 * What is locked, beside the table, where all of the migration goes: others' tables that
 * have its trigger; shadows and logs, at which VACUUM may be.  Needs SPI.
 */
static List *
relations_to_clear(const RmMigration *m)
{
	List	   *list = rm_rewrite_tables_with_trigger(m);
	ListCell   *lc;

	foreach(lc, rm_rewrite_load_all(m))
	{
		list = add_if_there(list, ((RmRewrite *) lfirst(lc))->shadow);
		list = add_if_there(list, ((RmRewrite *) lfirst(lc))->log);
	}
	return list;
}

/*
 * The way back of a migration whose table is gone: what it has left goes, also in tables
 * that were detached.  Nobody is kept waiting while this waits for others.  Needs SPI.
 */
void
rm_rewrite_clear(const RmMigration *m)
{
	RmLockAccount account = {.cxt = CurrentMemoryContext};
	List	   *relids = relations_to_clear(m);

	if (relids != NIL)
		rm_lock_relations(&account, relids, AccessExclusiveLock, 0);
	rm_rewrite_drop_trigger(m);
	rm_rewrite_forget(m);
}

static void
forget_all(const RmMigration *m)
{
	rm_rewrite_forget(m);
	rm_forget_failures(m);
}

/*
 * Has the change made on an empty copy of the table: raises what PostgreSQL says
 * of it.  Nothing is left of the copy.  The caller holds a lock on the table.
 * Needs SPI.
 */
static Twin
rehearse_on_twin(RmMigration *m, Oid relid)
{
	Twin		twin = {.m = m,.relid = relid,
		.attnums = rm_attnums_of(m->columns, relid),
	.cxt = CurrentMemoryContext};
	ErrorData  *error = rm_rehearse(ask_twin, &twin, CurrentMemoryContext);

	if (error == NULL)
		return twin;
	if (error->detail == NULL)
		error->detail = psprintf("The change was tried on an empty copy of %s; ALTER TABLE would refuse it too.",
								 rm_relation_sql(relid));
	ReThrowError(error);
}

void
rm_rewrite_rehearse(RmMigration *m)
{
	(void) rehearse_on_twin(m, m->relid);
}

/*
 * Shadow and log of a table, beside everybody; false if it is no partition any more.
 * 42P01 if it is the migration's own, and gone.
 */
static bool
make_tables(RmRun *run, Oid relid)
{
	RmMigration *m = run->m;
	Twin		twin;
	RmRewrite	rw = {.id = m->id,.relid = relid};
	Relation	rel;
	Relation	key;

	if (relid == m->relid)
		rm_lock_relation(&run->locks, relid, AccessShareLock);
	else if (!rm_lock_relation_if_there(&run->locks, relid, AccessShareLock))
		return false;
	rel = table_open(relid, NoLock);
	rm_check_owner(relid, m->relation);
	if (!rm_is_leaf_of(rel, m->relid))
	{
		table_close(rel, NoLock);
		return false;
	}
	/* a column that was dropped has no number here */
	rm_check_ground(m, rel);
	if (relid == m->relid)
		rm_rewrite_refuse(rel, m->columns);
	else
		refuse_leaf(rel, m->relid, m->columns);
	twin = rehearse_on_twin(m, relid);

	rw.key_index = find_key_index(rel);
	key = index_open(rw.key_index, AccessShareLock);
	rw.shadow = create_shadow(m->id, rel, &twin);
	rw.shadow_storage = relfilenode_of(rw.shadow);
	rm_chunks_forget(rw.shadow);	/* of another table that had this OID */
	rw.log = rm_log_create(m->id, rel, key);
	index_close(key, NoLock);
	rw.ground = ground_of(relid);
	table_close(rel, NoLock);
	insert_rewrite(&rw);
	return true;
}

/* a table that has no shadow yet, among those that are to be begun; see choose_table() */
static Oid
table_without_shadow(RmRun *run)
{
	RmMigration *m = run->m;
	List	   *gone;
	List	   *missing;
	Oid			relid;

	if (OidIsValid(m->leaf))
		return rm_rewrite_load(m, m->leaf) ? InvalidOid : m->leaf;
	while (OidIsValid(relid = next_listed(run)))
		if (rm_rewrite_load(m, relid) == NULL)
			return relid;
	(void) match_tables(m, &gone, &missing);
	list_leaves(run, missing);
	return next_listed(run);
}

/*
 * One table at a time gets its shadow and its log.  Whatever there is of an
 * earlier try is dropped first.
 */
static RmStepResult
begin_tables(RmRun *run)
{
	RmMigration *m = run->m;
	Oid			relid;

	if (m->phase == RM_BEGIN_ANEW && OidIsValid(m->leaf))
	{
		RmRewrite  *rw = rm_rewrite_load(m, m->leaf);

		if (rw)
			drop_tables(m, rw);
	}
	else if (m->phase == RM_BEGIN_ANEW)
		forget_all(m);
	m->phase = RM_BEGIN_TABLES;

	relid = table_without_shadow(run);
	if (!OidIsValid(relid))
		m->phase = RM_BEGIN_LOGS;
	else if (!make_tables(run, relid) && relid == m->leaf)
	{
		m->leaf = InvalidOid;
		m->phase = RM_BEGIN_NOTHING;
		return RM_STEP_DONE;
	}
	return RM_STEP_AGAIN;
}

/* nobody writes rel: from here on its log has every change */
static void
begin_log(RmMigration *m, RmRewrite *rw, Relation rel)
{
	rw->trigger_mark = trigger_mark(m, rw->relid);
	rw->relfilenode = rel->rd_rel->relfilenode;
	rw->end_block = RelationGetNumberOfBlocks(rel);
	rw->steps_done = RM_REWRITE_COPY;
	take_s0(rw);
	save_s0(rw);
	rm_rewrite_save(rw);
	m->relfilenode = rw->relfilenode;
	m->next_block = 0;
	m->end_block = rw->end_block;
}

/* the same for one of the tables that hold rows */
static RmStepResult
begin_log_of_leaf(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel = rm_leaf_open(run, ShareRowExclusiveLock);
	RmRewrite  *rw;

	m->phase = RM_BEGIN_NOTHING;
	if (rel == NULL)
		return RM_STEP_DONE;
	rw = rm_rewrite_load(m, RelationGetRelid(rel));
	table_close(rel, NoLock);
	if (rw == NULL || changed_ground(rw) != NULL)
	{
		m->phase = RM_BEGIN_ANEW;
		return RM_STEP_AGAIN;
	}
	arm_leaf(m, rw->relid);
	rel = table_open(rw->relid, NoLock);
	check_ground(m, rw, changed_ground(rw));
	begin_log(m, rw, rel);
	table_close(rel, NoLock);
	return RM_STEP_DONE;
}

/* the same for all, in one transaction, in which nobody writes any of them */
static RmStepResult
begin_logs(RmRun *run)
{
	RmMigration *m = run->m;
	List	   *tables;
	List	   *gone;
	List	   *missing;
	ListCell   *lc;

	rm_lock_tree(run, ShareRowExclusiveLock);
	foreach(lc, rm_rewrite_load_all(m))
	{
		RmRewrite  *rw = lfirst(lc);

		if (rw->relid != m->relid && changed_ground(rw) != NULL)
			drop_tables(m, rw);	/* or gone */
	}
	tables = match_tables(m, &gone, &missing);
	if (missing != NIL)
	{
		m->phase = RM_BEGIN_TABLES; /* a partition that has come meanwhile */
		return RM_STEP_AGAIN;
	}
	m->by_leaf = !rm_is_parted(m) && list_length(rm_tree(m->relid)) > 1;
	create_trigger(m, m->relid);
	if (m->by_leaf)
		foreach(lc, rm_tree_leaves(m->relid))
			create_trigger(m, lfirst_oid(lc));
	m->rows_done = m->rows_estimated = 0;
	/* but for what is no partition any more */
	foreach(lc, tables)
	{
		RmRewrite  *rw = lfirst(lc);
		Relation	rel;

		rel = table_open(rw->relid, NoLock);
		/* that of the others has been looked at above */
		check_ground(m, rw, rw->relid == m->relid ? changed_ground(rw) : NULL);
		m->rows_estimated += rel->rd_rel->reltuples > 0 ? (int64) rel->rd_rel->reltuples : 0;
		begin_log(m, rw, rel);
		table_close(rel, NoLock);
	}
	m->phase = RM_BEGIN_NOTHING;
	return RM_STEP_DONE;
}

/* one transaction of "begin", which m->phase tells */
RmStepResult
rm_rewrite_begin(RmRun *run)
{
	if (run->m->phase != RM_BEGIN_LOGS)
		return begin_tables(run);
	rm_ranges_forget(run->m);
	return OidIsValid(run->m->leaf) ? begin_log_of_leaf(run) : begin_logs(run);
}

static RmStepResult
begin_apply(RmRun *run)
{
	if (run->m->phase == RM_BEGIN_NOTHING)
		run->m->phase = RM_BEGIN_ANEW;
	return rm_rewrite_begin(run);
}

/* everything of ours goes; the table is what it was all the time */
static RmStepResult
begin_revert(RmRun *run)
{
	RmMigration *m = run->m;

	rm_lock_tree_and(run, AccessExclusiveLock, relations_to_clear(m));
	rm_check_owner(m->relid, m->relation);
	run->old_storage = rm_relation_storage(m->relid);
	rm_rewrite_drop_trigger(m);
	rm_ranges_forget(m);
	forget_all(m);
	return RM_STEP_DONE;
}

/* shadows and logs, which nobody knows but us: the trigger is not there yet */
static void
begin_abandon(RmMigration *m)
{
	forget_all(m);
}

const RmStep rm_step_rewrite_begin = {
	.name = "begin",
	.locks_once = true,
	.apply = begin_apply,
	.revert = begin_revert,
	.abandon = begin_abandon,
};

/* the way back of the steps that only fill what "begin" has made */
RmStepResult
rm_rewrite_nothing(RmRun *run)
{
	return RM_STEP_DONE;
}

/*-------------------------------------------------------------------------
 * The method
 *-------------------------------------------------------------------------
 */

static const RmStep *const steps[] = {
	[RM_REWRITE_BEGIN] = &rm_step_rewrite_begin,
	[RM_REWRITE_COPY] = &rm_step_rewrite_copy,
	[RM_REWRITE_INDEX] = &rm_step_rewrite_index,
	[RM_REWRITE_CATCH_UP] = &rm_step_rewrite_catch_up,
	[RM_REWRITE_VERIFY] = &rm_step_rewrite_verify,
	[RM_REWRITE_CUT_OVER] = &rm_step_rewrite_cut_over,
	[RM_REWRITE_FINISH] = &rm_step_rewrite_finish,
};

const RmMethod rm_method_online_rewrite = {
	.name = "online_rewrite",
	.steps = steps,
	.nsteps = lengthof(steps),
};
