/*-------------------------------------------------------------------------
 *
 * leaves.c
 *	  The tables that hold a table's rows: itself, its children, or its partitions.
 *
 * A migration is one of one table, the root.  Where that is partitioned, or others
 * inherit from it, the statements that change its definition go to the root, and
 * PostgreSQL takes them down to everything below; all of that is locked first, at
 * once.  Rows are another matter: they are filled and verified leaf by leaf, each
 * with a lock on that leaf only.  A table with children is a leaf itself, beside
 * them.
 *
 * The row of state says where the leaf under way stands (leaf, relfilenode,
 * next_block, end_block), as it does for a plain table, which has no leaf but
 * itself.  The table risky_migrations.leaf says which leaves there are, and
 * which are done (m->by_leaf: it is used).  It is compared with the catalogs each
 * time that another one is chosen: a leaf that was attached meanwhile is added, one
 * that was detached or dropped is left out.
 *
 * What PostgreSQL does for a partition it does not do for a child:
 *
 *	A row trigger is not passed on.  Each child gets its own, and one that comes later
 *	has none: it is made by whoever comes to choose the next leaf, to build, or to go
 *	back (rm_leaves_arm).  What was written before that is found by the
 *	verification, to which the build goes back for it (rm_leaves_are_late), though
 *	not for ever (rm_begin_again); and after the swap by the look at the way back.  Until then nobody is held to the shadow
 *	column: it is not NOT NULL before the exchange.
 *
 *	A child that was taken away and put back has its trigger still, which did nothing
 *	meanwhile.  So the mark by which a verified leaf is known has the rows of
 *	pg_inherits in it (rm_leaf_mark).
 *
 *	Indexes, keys and foreign keys are each table's own, and are built, renamed and
 *	dropped for that one alone.  CHECK and (from 18 on) NOT NULL are inherited, and may
 *	be a child's own besides, as its columns may: see dependents.c.
 *
 *	A table may get its first child in the middle (rm_leaves_discover).
 *
 * Easy to get wrong: a leaf's columns have other numbers than the root's, and
 * so the migration that is known to whoever works on its rows is a copy with
 * the leaf's own (rm_migration_on()).  Columns of root and leaf have the same
 * names; these are looked up without a lock on the root, since whoever writes
 * a leaf must not begin to wait for one.  That is safe: to rename or drop a
 * column of the root one has to lock the leaf too, which the caller has locked.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/attmap.h"
#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "catalog/partition.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "crew.h"
#include "executor/spi.h"
#include "leaves.h"
#include "rewrite/rewriteManip.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

/*-------------------------------------------------------------------------
 * The tree
 *-------------------------------------------------------------------------
 */

bool
rm_is_parted(const RmMigration *m)
{
	return get_rel_relkind(m->relid) == RELKIND_PARTITIONED_TABLE;
}

/*
 * OIDs of the table and of all below it, parents before their children; no locks.
 * 42P01 if it is gone.  find_all_inheritors(), without locks, fails with XX000 where
 * one below it has been dropped since its parent's children were listed.
 */
List *
rm_tree(Oid relid)
{
	List	   *tree = list_make1_oid(relid);
	ListCell   *lc;

	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
		rm_refuse_missing(relid);
	/* it grows meanwhile; what is asked here is in the cache when it is asked again */
	foreach(lc, tree)
		if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(lfirst_oid(lc))))
			tree = list_concat_unique_oid(tree, find_inheritance_children(lfirst_oid(lc), NoLock));
	return tree;
}

/*
 * OIDs of all below the table, each locked with ACCESS SHARE, which may be waited for,
 * and still there and below it then.
 */
List *
rm_lock_below(Relation root)
{
	List	   *list = NIL;
	ListCell   *lc;

	foreach(lc, find_all_inheritors(RelationGetRelid(root), AccessShareLock, NULL))
	{
		Relation	rel = relation_open(lfirst_oid(lc), NoLock);

		if (lfirst_oid(lc) != RelationGetRelid(root) && rm_is_leaf_of(rel, RelationGetRelid(root)))
			list = lappend_oid(list, lfirst_oid(lc));
		relation_close(rel, NoLock);
	}
	return list;
}

/* the same as rm_tree(), but not what inherits from an ordinary table */
List *
rm_members(Oid relid)
{
	if (get_rel_relkind(relid) != RELKIND_PARTITIONED_TABLE)
		return list_make1_oid(relid);
	return rm_tree(relid);
}

/* those of them that hold rows */
List *
rm_tree_leaves(Oid relid)
{
	List	   *leaves = NIL;
	ListCell   *lc;

	foreach(lc, rm_tree(relid))
		if (get_rel_relkind(lfirst_oid(lc)) != RELKIND_PARTITIONED_TABLE)
			leaves = lappend_oid(leaves, lfirst_oid(lc));
	return leaves;
}

/* the beginning of an ALTER TABLE that concerns the table and all below it */
const char *
rm_alter_sql(const RmMigration *m)
{
	return psprintf("ALTER TABLE %s", rm_relation_sql(m->relid));
}

/*
 * Locks the table and all below it, as rm_lock_relations() does.  After that the
 * tree stays as it is: whoever attaches locks the parent, whoever takes away the
 * child.
 */
void
rm_lock_tree(RmRun *run, LOCKMODE mode)
{
	rm_lock_tree_and(run, mode, NIL);
}

/* the same with further tables, in one set */
void
rm_lock_tree_and(RmRun *run, LOCKMODE mode, List *others)
{
	RmMigration *m = run->m;
	List	   *relids = rm_tree(m->relid);

	rm_lock_relations(&run->locks, list_concat_unique_oid(list_copy(relids), others), mode, run->tries);
	if (list_difference_oid(rm_tree(m->relid), relids) != NIL)
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("%s has just got another %s", m->relation,
						rm_is_parted(m) ? "partition" : "child")));
}

/* the sync trigger of every session must read the migration again */
void
rm_invalidate_tree(const RmMigration *m)
{
	ListCell   *lc;

	foreach(lc, rm_tree(m->relid))
		CacheInvalidateRelcacheByRelid(lfirst_oid(lc));
}

/*-------------------------------------------------------------------------
 * Columns of a leaf
 *-------------------------------------------------------------------------
 */

/*
 * Does relid inherit from root, through whatever tables?  *mark is combined with
 * the transactions that have made the links between: another one when a child has
 * been away for a while.
 */
static bool
inherits_from(Oid relid, Oid root, uint64 *mark)
{
	Relation	pg_inherits;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tup;
	bool		found = false;

	if (relid == root)
		return true;
	pg_inherits = table_open(InheritsRelationId, AccessShareLock);
	ScanKeyInit(&key, Anum_pg_inherits_inhrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));
	scan = systable_beginscan(pg_inherits, InheritsRelidSeqnoIndexId, true, NULL, 1, &key);
	while (HeapTupleIsValid(tup = systable_getnext(scan)))
		if (inherits_from(((Form_pg_inherits) GETSTRUCT(tup))->inhparent, root, mark))
		{
			*mark = hash_combine64(*mark, HeapTupleHeaderGetRawXmin(tup->t_data));
			found = true;
		}
	systable_endscan(scan);
	table_close(pg_inherits, AccessShareLock);
	return found;
}

/* does rel, which is locked, hold rows of the table root? */
bool
rm_is_leaf_of(Relation rel, Oid root)
{
	uint64		mark = 0;

	if (RelationGetRelid(rel) == root)
		return true;
	if (rel->rd_rel->relispartition)
		return list_member_oid(get_partition_ancestors(RelationGetRelid(rel)), root);
	return inherits_from(RelationGetRelid(rel), root, &mark);
}

/*
 * A mark that changes when relid has been taken out of the tree and put back; of
 * partitions always the same, for they get another trigger then.
 */
uint64
rm_leaf_mark(Oid relid, Oid root)
{
	uint64		mark = 0;

	if (relid != root && get_rel_relkind(root) != RELKIND_PARTITIONED_TABLE)
		(void) inherits_from(relid, root, &mark);
	return mark;
}

/*
 * Number of the root's column in the leaf; one that no table has if either does
 * not have it.
 */
AttrNumber
rm_leaf_attnum(Oid root, AttrNumber attnum, Oid leaf)
{
	HeapTuple	tup;
	AttrNumber	result = MaxHeapAttributeNumber + 1;

	if (root == leaf || attnum <= 0)
		return attnum;
	tup = SearchSysCacheAttNum(root, attnum);	/* NULL if dropped */
	if (HeapTupleIsValid(tup))
	{
		result = get_attnum(leaf, NameStr(((Form_pg_attribute) GETSTRUCT(tup))->attname));
		ReleaseSysCache(tup);
	}
	return result;
}

static int
number_of_columns(Oid relid)
{
	HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	int			n;

	if (!HeapTupleIsValid(tup))
		rm_refuse_missing(relid);
	n = ((Form_pg_class) GETSTRUCT(tup))->relnatts;
	ReleaseSysCache(tup);
	return n;
}

/*
 * An expression over the root's columns as one over those of rel.
 */
Node *
rm_leaf_expression(Node *expr, Oid root, Relation rel)
{
	AttrMap    *map;
	bool		whole_row;

	if (root == RelationGetRelid(rel))
		return expr;
	map = make_attrmap(number_of_columns(root));
	for (int i = 0; i < map->maplen; i++)
		map->attnums[i] = rm_leaf_attnum(root, i + 1, RelationGetRelid(rel));
	expr = map_variable_attnos(expr, 1, 0, map, InvalidOid, &whole_row);
	free_attrmap(map);
	return expr;
}

/*
 * The migration with the numbers that its columns have in rel, a leaf: itself,
 * or a copy for work on rows.  Only the root's is ever saved.
 */
RmMigration *
rm_migration_on(RmMigration *m, Relation rel)
{
	RmMigration *copy;

	if (RelationGetRelid(rel) == m->relid)
		return m;
	copy = palloc(sizeof(RmMigration));
	*copy = *m;
	copy->attnum = rm_leaf_attnum(m->relid, m->attnum, RelationGetRelid(rel));
	copy->new_attnum = rm_leaf_attnum(m->relid, m->new_attnum, RelationGetRelid(rel));
	return copy;
}

/*-------------------------------------------------------------------------
 * Which leaves are done
 *-------------------------------------------------------------------------
 */

static Datum
oid_array(List *oids)
{
	Datum	   *elems = palloc(sizeof(Datum) * Max(list_length(oids), 1));
	int			n = 0;
	ListCell   *lc;

	foreach(lc, oids)
		elems[n++] = ObjectIdGetDatum(lfirst_oid(lc));
	return PointerGetDatum(construct_array(elems, n, OIDOID, sizeof(Oid), true,
										   TYPALIGN_INT));
}

/* no leaf is known, none is under way */
void
rm_leaves_forget(RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("DELETE FROM risky_migrations.leaf WHERE migration_id = $1",
					 1, types, v, NULL);
	m->leaf = InvalidOid;
	m->relfilenode = InvalidOid;
	m->next_block = m->end_block = 0;
}

/* nothing is done in any of them; their ends are fixed as they are begun */
void
rm_leaves_reset(RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("UPDATE risky_migrations.leaf SET done = false, relfilenode = 0"
					 " WHERE migration_id = $1", 1, types, v, NULL);
	m->leaf = InvalidOid;
}

/*
 * Fixes the amount of work: the pages that all leaves have now.  The caller
 * holds locks on them that keep writers away.
 */
void
rm_leaves_begin(RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDOID, OIDOID, INT8OID};
	ListCell   *lc;

	rm_leaves_forget(m);
	m->by_leaf = true;
	foreach(lc, rm_tree_leaves(m->relid))
	{
		Relation	rel = table_open(lfirst_oid(lc), NoLock);
		Datum		v[] = {Int64GetDatum(m->id), ObjectIdGetDatum(lfirst_oid(lc)),
			ObjectIdGetDatum(rel->rd_rel->relfilenode),
		Int64GetDatum(RelationGetNumberOfBlocks(rel))};

		table_close(rel, NoLock);
		rm_state_execute("INSERT INTO risky_migrations.leaf (migration_id, relid, relfilenode, end_block)"
						 " VALUES ($1, $2, $3, $4)", 4, types, v, NULL);
	}
}

/*
 * The table has got its first child after the migration began: from now on its
 * rows are one leaf's.  What was verified of them keeps its worth.  True if so.
 */
bool
rm_leaves_discover(RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDOID, OIDOID, INT8OID, BOOLOID};
	Datum		v[5];

	if (m->by_leaf || list_length(rm_tree(m->relid)) == 1)
		return false;
	v[0] = Int64GetDatum(m->id);
	v[1] = ObjectIdGetDatum(m->relid);
	v[2] = ObjectIdGetDatum(m->relfilenode);
	v[3] = Int64GetDatum(m->trigger_xmin);
	v[4] = BoolGetDatum(m->steps_done > RM_ENFORCE_NOT_NULL && m->trigger_xmin != 0);
	rm_state_execute("INSERT INTO risky_migrations.leaf (migration_id, relid, relfilenode, trigger_xmin, done)"
					 " VALUES ($1, $2, $3, $4, $5)", 5, types, v, NULL);
	m->by_leaf = true;
	rm_ranges_forget(m);
	return true;
}

/* tells that a table with the shadow column does not belong to the tree any more */
static void
notice_left_out(const RmMigration *m, Oid relid)
{
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
		return;
	if (rm_is_parted(m))
		ereport(NOTICE,
				(errmsg("migration %lld: %s is no partition of %s any more, it is left as it is now",
						(long long) m->id, rm_relation_sql(relid), m->relation),
				 errhint("It may have a column of the migration, which is yours to drop.")));
	else
		ereport(NOTICE,
				(errmsg("migration %lld: %s does not inherit from %s any more, it is left as it is now",
						(long long) m->id, rm_relation_sql(relid), m->relation),
				 errhint("It may have a column, a trigger and constraints of the migration, which are yours to drop.")));
}

/* compares the list with the catalogs: what is new is to be done */
static void
refresh(const RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDARRAYOID};
	Datum		v[] = {Int64GetDatum(m->id), oid_array(rm_tree_leaves(m->relid))};

	rm_state_execute("DELETE FROM risky_migrations.leaf"
					 " WHERE migration_id = $1 AND relid <> ALL ($2) RETURNING relid",
					 2, types, v, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
		notice_left_out(m, DatumGetObjectId(rm_result_datum(i, 1)));
	rm_state_execute("INSERT INTO risky_migrations.leaf (migration_id, relid)"
					 " SELECT $1, r FROM pg_catalog.unnest($2) r"
					 " ON CONFLICT DO NOTHING", 2, types, v, NULL);
}

/*
 * Of the verification: a leaf whose trigger was switched off, dropped or made
 * again since it was verified, or that has none, is to be done again.
 */
void
rm_leaves_check_again(RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDARRAYOID};
	Datum		v[] = {Int64GetDatum(m->id), 0};
	List	   *again = NIL;

	refresh(m);
	rm_state_execute("SELECT relid, trigger_xmin FROM risky_migrations.leaf"
					 " WHERE migration_id = $1 AND done", 1, types, v, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		Oid			relid = DatumGetObjectId(rm_result_datum(i, 1));

		if (rm_result_int64(i, 2) == 0 || rm_result_int64(i, 2) != rm_trigger_xmin_of(m, relid))
			again = lappend_oid(again, relid);
	}
	if (again == NIL)
		return;
	v[1] = oid_array(again);
	rm_state_execute("UPDATE risky_migrations.leaf SET done = false, relfilenode = 0"
					 " WHERE migration_id = $1 AND relid = ANY ($2)", 2, types, v, NULL);
}

/* a leaf counts as done with the trigger that it has now */
static void
adopt(const RmMigration *m, Relation rel)
{
	Oid			types[] = {INT8OID, OIDOID, INT8OID, OIDOID};
	Datum		v[] = {Int64GetDatum(m->id), ObjectIdGetDatum(RelationGetRelid(rel)),
		Int64GetDatum(rm_trigger_xmin_of(m, RelationGetRelid(rel))),
	ObjectIdGetDatum(rel->rd_rel->relfilenode)};

	rm_state_execute("UPDATE risky_migrations.leaf SET done = true, trigger_xmin = $3,"
					 " relfilenode = $4 WHERE migration_id = $1 AND relid = $2",
					 4, types, v, NULL);
}

/* are all leaves done?  The list is as it was at the last look */
bool
rm_leaves_done(RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("SELECT FROM risky_migrations.leaf WHERE migration_id = $1"
					 " AND NOT done LIMIT 1", 1, types, v, NULL);
	return SPI_processed == 0;
}

/*
 * Of the build: are children all that is to be verified (again)?  They have come
 * since, or have been away for a while; whoever makes one and writes it meets the
 * migration by chance, and need not be told.  The list is as it was at the last look.
 */
bool
rm_leaves_are_late(const RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDOID};
	Datum		v[] = {Int64GetDatum(m->id), ObjectIdGetDatum(m->relid)};

	if (!m->by_leaf || rm_is_parted(m) || m->trigger_xmin == 0 ||
		m->trigger_xmin == rm_trigger_xmin(m))
		return false;
	rm_state_execute("SELECT FROM risky_migrations.leaf WHERE migration_id = $1"
					 " AND relid = $2 AND done", 2, types, v, NULL);
	return SPI_processed > 0;
}

/* has each leaf that was verified, and is one still, the trigger that it had then? */
bool
rm_leaves_watched(RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDARRAYOID};
	Datum		v[] = {Int64GetDatum(m->id), oid_array(rm_tree_leaves(m->relid))};

	rm_state_execute("SELECT relid, trigger_xmin FROM risky_migrations.leaf"
					 " WHERE migration_id = $1 AND done AND relid = ANY ($2)", 2, types, v, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
		if (rm_result_int64(i, 2) != rm_trigger_xmin_of(m, DatumGetObjectId(rm_result_datum(i, 1))))
			return false;
	return true;
}

/*
 * Of the way back: rel, a leaf, has been looked through, whether it was there
 * before or has come since; or (NULL) it is none any more.
 */
void
rm_leaf_adopt(RmMigration *m, Relation rel)
{
	if (!m->by_leaf || !rm_leaves_watched(m))
		return;
	refresh(m);
	if (rel)
		adopt(m, rel);
	if (rm_leaves_done(m))
		m->trigger_xmin = rm_trigger_xmin(m);
}

/*
 * Of the build: a leaf that has come since all were verified, and holds nothing,
 * needs no verification, since it has its trigger: a partition from the beginning, a
 * child by rm_leaves_arm().  The caller holds locks that keep the leaves from being
 * dropped.  Where that was all that was missing the table is as good as verified.
 */
void
rm_leaves_accept_empty(RmRun *run)
{
	RmMigration *m = run->m;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};
	List	   *open = NIL;
	ListCell   *lc;

	if (m->trigger_xmin == 0 || m->trigger_xmin == rm_trigger_xmin(m))
		return;
	rm_leaves_check_again(m);
	rm_state_execute("SELECT relid FROM risky_migrations.leaf"
					 " WHERE migration_id = $1 AND NOT done", 1, types, v, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
		open = lappend_oid(open, DatumGetObjectId(rm_result_datum(i, 1)));
	foreach(lc, open)
	{
		Relation	rel;

		/* one that has come since the caller locked the others may be going again */
		if (!ConditionalLockRelationOid(lfirst_oid(lc), AccessShareLock) ||
			(rel = try_table_open(lfirst_oid(lc), NoLock)) == NULL)
			continue;
		if (rm_trigger_xmin_of(m, lfirst_oid(lc)) != 0 && RelationGetNumberOfBlocks(rel) == 0)
		{
			rm_check_ground(rm_migration_on(m, rel), rel);
			adopt(m, rel);
		}
		table_close(rel, NoLock);
	}
	if (rm_leaves_done(m))
		m->trigger_xmin = rm_trigger_xmin(m);
}

/* is it a child that has come without the trigger? */
bool
rm_leaf_is_unarmed(const RmMigration *m, Oid relid)
{
	return relid != m->relid && !rm_is_parted(m) && rm_trigger_xmin_of(m, relid) == 0;
}

/* one of them, InvalidOid if there is none */
static Oid
find_unarmed(const RmMigration *m)
{
	ListCell   *lc;

	foreach(lc, rm_tree_leaves(m->relid))
		if (rm_leaf_is_unarmed(m, lfirst_oid(lc)))
			return lfirst_oid(lc);
	return InvalidOid;
}

/*
 * A child that has come since the migration began has the shadow column, but no
 * sync trigger, as a partition would have: it is made now, in a transaction that
 * is for this alone (true), with a lock on the child that keeps its writers away,
 * so that whoever has written it before is looked at afterwards.  Nothing may be
 * locked yet.
 */
bool
rm_leaves_arm(RmRun *run)
{
	RmMigration *m = run->m;
	Oid			relid;
	Relation	rel;

	if (rm_is_parted(m) || (!m->by_leaf && !rm_leaves_discover(m)))
		return false;
	relid = find_unarmed(m);
	if (!OidIsValid(relid))
		return false;
	if (!rm_lock_relation_if_there(&run->locks, relid, ShareRowExclusiveLock))
		return true;
	rel = table_open(relid, NoLock);
	if (rm_is_leaf_of(rel, m->relid) && rm_leaf_is_unarmed(m, relid))
	{
		rm_refuse_child(rel, m->relid, m->column);
		table_close(rel, NoLock);
		rm_sync_trigger_make(m, relid);
	}
	else
		table_close(rel, NoLock);
	return true;
}

/*
 * Chooses the next leaf to be done; false if there is none.  It is begun when
 * it is opened.  m->leaf stays 0 where that is a child to be armed first.
 */
bool
rm_leaves_choose(RmRun *run)
{
	RmMigration *m = run->m;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};
	Relation	root;

	rm_lock_relation(&run->locks, m->relid, AccessShareLock);
	rm_check_owner(m->relid, m->relation);
	root = table_open(m->relid, NoLock);
	rm_check_ground(m, root);
	table_close(root, NoLock);
	refresh(m);
	rm_state_execute("SELECT relid, relfilenode, end_block FROM risky_migrations.leaf"
					 " WHERE migration_id = $1 AND NOT done ORDER BY relid LIMIT 1",
					 1, types, v, NULL);
	m->leaf = m->relfilenode = InvalidOid;
	m->next_block = m->end_block = 0;
	if (SPI_processed == 0)
		return false;
	m->leaf = DatumGetObjectId(rm_result_datum(0, 1));
	m->relfilenode = DatumGetObjectId(rm_result_datum(0, 2));
	m->end_block = rm_result_int64(0, 3);
	m->trigger_xmin = rm_trigger_xmin_of(m, m->leaf);
	if (rm_leaf_is_unarmed(m, m->leaf))
		m->leaf = m->relfilenode = InvalidOid;
	return true;
}

/*
 * Locks and opens what holds the rows: the table, or the leaf under way.  NULL
 * if that is no leaf of the table any more; then another is to be chosen.
 */
Relation
rm_leaf_open(RmRun *run, LOCKMODE mode)
{
	RmMigration *m = run->m;
	Oid			relid = OidIsValid(m->leaf) ? m->leaf : m->relid;
	Relation	rel = NULL;

	/* a partition may be dropped at any time before it is locked */
	if (relid == m->relid)
	{
		rm_lock_relation(&run->locks, relid, mode);
		rel = table_open(relid, NoLock);
	}
	else if (rm_lock_relation_if_there(&run->locks, relid, mode))
		rel = table_open(relid, NoLock);
	if (rel && !rm_is_leaf_of(rel, m->relid))
	{
		table_close(rel, NoLock);
		rel = NULL;
	}
	if (rel == NULL)
		m->leaf = InvalidOid;
	else
		rm_check_ground(rm_migration_on(m, rel), rel);
	if (rel && OidIsValid(m->leaf) && !OidIsValid(m->relfilenode))
		rm_backfill_fix_end(m, rel);	/* one that was attached meanwhile */
	return rel;
}

/* the leaf under way is done */
void
rm_leaf_done(RmMigration *m)
{
	Oid			types[] = {INT8OID, OIDOID, INT8OID, OIDOID, INT8OID};
	Datum		v[] = {Int64GetDatum(m->id), ObjectIdGetDatum(m->leaf),
	Int64GetDatum(m->trigger_xmin), ObjectIdGetDatum(m->relfilenode), Int64GetDatum(m->end_block)};

	rm_state_execute("UPDATE risky_migrations.leaf SET done = true, trigger_xmin = $3,"
					 " relfilenode = $4, end_block = $5"
					 " WHERE migration_id = $1 AND relid = $2", 5, types, v, NULL);
	m->leaf = InvalidOid;
	m->relfilenode = InvalidOid;
	m->next_block = m->end_block = 0;
}

/*
 * For rm_progress: what was said of the leaf under way becomes true of the
 * table.  The other leaves are added up once for each leaf, by a query that gives
 * pages done and pages, of the migration $1 without the leaf $2; $3 is the step.
 */
void
rm_add_other_leaves(RmRun *run, Oid leaf, const char *sql)
{
	Oid			types[] = {INT8OID, OIDOID, INT8OID};
	Datum		v[] = {Int64GetDatum(run->m->id), ObjectIdGetDatum(leaf), Int64GetDatum(run->step_index)};

	if (run->summed_leaf != leaf)
	{
		rm_state_execute(sql, lengthof(types), types, v, NULL);
		run->other_blocks_done = rm_result_int64(0, 1);
		run->other_blocks = rm_result_int64(0, 2);
		run->summed_leaf = leaf;
	}
	run->progress.blocks_done += run->other_blocks_done;
	run->progress.blocks_total += run->other_blocks;
}

void
rm_leaves_progress(RmRun *run)
{
	if (OidIsValid(run->m->leaf))
		rm_add_other_leaves(run, run->m->leaf,
							"SELECT coalesce(sum(end_block) FILTER (WHERE done), 0)::bigint,"
							" coalesce(sum(end_block), 0)::bigint"
							" FROM risky_migrations.leaf WHERE migration_id = $1 AND relid <> $2");
}
