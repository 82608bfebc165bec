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
 *	index		the shadow gets the indexes that PostgreSQL would make for the
 *				changed table, built by sort.
 *	catch_up	see rewrite_replay.c
 *	verify		see rewrite_verify.c
 *	cut_over	see rewrite_exchange.c
 *	finish		foreign keys that were carried over unproven are proven; ANALYZE
 *				where there are statistics objects.
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
 * copy appends pages of its own and forgets those that were not committed.
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
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/reloptions.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/catalog.h"
#include "catalog/dependency.h"
#include "catalog/heap.h"
#include "catalog/namespace.h"
#include "catalog/objectaddress.h"
#include "catalog/partition.h"
#include "catalog/pg_am.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_type.h"
#include "catalog/toasting.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "compat.h"
#include "dependents.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "optimizer/optimizer.h"
#include "parser/parse_utilcmd.h"
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

static char *
shadow_name(int64 id)
{
	return psprintf("shadow_%lld", (long long) id);
}

/* of the shadow's index that takes the place of that one of the table */
static char *
shadow_index_name(const RmMigration *m, Oid index)
{
	return psprintf("shadow_%lld_%u", (long long) m->id, index);
}

/* the same that index itself; InvalidOid if it has not been built */
Oid
rm_rewrite_shadow_index(const RmMigration *m, Oid original)
{
	return get_relname_relid(shadow_index_name(m, original),
							 get_namespace_oid(RM_SCHEMA, false));
}

/* the shadow's index that tells its rows apart */
Oid
rm_rewrite_shadow_key(const RmMigration *m, const RmRewrite *rw)
{
	Oid			index = rm_rewrite_shadow_index(m, rw->key_index);

	if (!OidIsValid(index))
		elog(ERROR, "the shadow of migration %lld has no index for its key", (long long) m->id);
	return index;
}

/* is the column that changes part of the key? */
bool
rm_rewrite_key_converts(const RmMigration *m, const RmRewrite *rw)
{
	Relation	index = index_open(rw->key_index, AccessShareLock);
	bool		converts = false;

	for (int i = 0; i < IndexRelationGetNumberOfKeyAttributes(index); i++)
		converts |= index->rd_index->indkey.values[i] == m->attnum;
	index_close(index, NoLock);
	return converts;
}

static char *
log_trigger_name(const RmMigration *m)
{
	return psprintf("~rm_log_%lld", (long long) m->id);
}

/* InvalidOid if there is no such relation */
Oid
rm_relfilenode(Oid relid)
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
 * Its row of state
 *-------------------------------------------------------------------------
 */

/* NULL if nothing has begun; needs SPI */
RmRewrite *
rm_rewrite_load(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};
	RmRewrite  *rw = palloc0(sizeof(RmRewrite));
	Datum	   *xids;

	rm_state_execute("SELECT shadow::int8, log::int8, key_index::int8, trigger_mark, ground,"
					 " s0_next, s0_xmin, s0_running, s0_overflowed::int::int8,"
					 " shadow_blocks, rows_failed, shadow_storage::int8, verified"
					 " FROM risky_migrations.rewrite WHERE migration_id = $1", 1, types, v, NULL);
	if (SPI_processed == 0)
		return NULL;
	rw->id = m->id;
	rw->shadow = rm_result_int64(0, 1);
	rw->log = rm_result_int64(0, 2);
	rw->key_index = rm_result_int64(0, 3);
	rw->trigger_mark = rm_result_int64(0, 4);
	rw->ground = rm_result_text(0, 5);
	rw->next_xid = (uint64) rm_result_int64(0, 6);
	rw->xmin = (TransactionId) rm_result_int64(0, 7);
	deconstruct_array(DatumGetArrayTypeP(rm_result_datum(0, 8)), INT8OID, sizeof(int64),
					  FLOAT8PASSBYVAL, TYPALIGN_DOUBLE, &xids, NULL, &rw->nrunning);
	rw->running = palloc(sizeof(TransactionId) * Max(rw->nrunning, 1));
	for (int i = 0; i < rw->nrunning; i++)
		rw->running[i] = (TransactionId) DatumGetInt64(xids[i]);
	rw->overflowed = rm_result_int64(0, 9) != 0;
	rw->shadow_blocks = rm_result_int64(0, 10);
	rw->rows_failed = rm_result_int64(0, 11);
	rw->shadow_storage = rm_result_int64(0, 12);
	rw->verified = *(ItemPointer) DatumGetPointer(rm_result_datum(0, 13));
	return rw;
}

/* writes what can change while it runs */
void
rm_rewrite_save(const RmRewrite *rw)
{
	Oid			types[] = {INT8OID, INT8OID, INT8OID, OIDOID, TIDOID};
	Datum		v[] = {Int64GetDatum(rw->id), Int64GetDatum(rw->shadow_blocks),
		Int64GetDatum(rw->rows_failed), ObjectIdGetDatum(rw->shadow_storage),
	PointerGetDatum(&rw->verified)};

	rm_state_execute("UPDATE risky_migrations.rewrite SET shadow_blocks = $2,"
					 " rows_failed = $3, shadow_storage = $4, verified = $5"
					 " WHERE migration_id = $1", lengthof(types), types, v, NULL);
}

/* the row without S0 */
static void
insert_rewrite(const RmRewrite *rw)
{
	Oid			types[] = {INT8OID, OIDOID, OIDOID, OIDOID, TEXTOID, OIDOID};
	Datum		v[] = {Int64GetDatum(rw->id), ObjectIdGetDatum(rw->shadow), ObjectIdGetDatum(rw->log),
		ObjectIdGetDatum(rw->key_index), CStringGetTextDatum(rw->ground),
	ObjectIdGetDatum(rw->shadow_storage)};

	rm_state_execute("INSERT INTO risky_migrations.rewrite (migration_id, shadow, log, key_index,"
					 " ground, shadow_storage) VALUES ($1, $2, $3, $4, $5, $6)",
					 lengthof(types), types, v, NULL);
}

/* S0, and the triggers that have noted everything since */
static void
save_s0(const RmRewrite *rw)
{
	Oid			types[] = {INT8OID, INT8OID, INT8OID, INT8OID, INT8ARRAYOID, BOOLOID};
	Datum	   *xids = palloc(sizeof(Datum) * Max(rw->nrunning, 1));
	Datum		v[lengthof(types)];

	for (int x = 0; x < rw->nrunning; x++)
		xids[x] = Int64GetDatum((int64) rw->running[x]);
	v[0] = Int64GetDatum(rw->id);
	v[1] = Int64GetDatum(rw->trigger_mark);
	v[2] = Int64GetDatum((int64) rw->next_xid);
	v[3] = Int64GetDatum((int64) rw->xmin);
	v[4] = PointerGetDatum(construct_array(xids, rw->nrunning, INT8OID, sizeof(int64),
										   FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	v[5] = BoolGetDatum(rw->overflowed);
	rm_state_execute("UPDATE risky_migrations.rewrite SET trigger_mark = $2, s0_next = $3,"
					 " s0_xmin = $4, s0_running = $5, s0_overflowed = $6 WHERE migration_id = $1",
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
	if (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE)
		refuse(rel, "It is partitioned.", "Use the method three_step.");
	if (rel->rd_rel->relkind != RELKIND_RELATION)
		refuse(rel, "It is not an ordinary table.", "Name an ordinary table.");
	if (rel->rd_rel->relam != HEAP_TABLE_AM_OID)
		refuse(rel, "Its table access method is not heap.",
			   "Only tables of the access method heap can be rewritten.");
	if (RelationUsesLocalBuffers(rel))
		refuse(rel, "It is a temporary table.",
			   "Nobody else can be waiting for it: use ALTER TABLE.");
	if (rel->rd_rel->relhassubclass || has_superclass(RelationGetRelid(rel)))
		refuse(rel, "It has parents or children by inheritance.",
			   "Use the method three_step.");
	if (IsCatalogRelation(rel) || RelationGetNamespace(rel) == get_namespace_oid(RM_SCHEMA, false))
		refuse(rel, "It is a system catalog, or belongs to this extension.",
			   "Name a table of your own.");
	if (rel->rd_rel->relrewrite != InvalidOid)
		refuse(rel, "It is a transient table.", "Name a table of your own.");
}

static void
refuse_columns(Relation rel, AttrNumber attnum)
{
	TupleDesc	desc = RelationGetDescr(rel);

	if (TupleDescAttr(desc, attnum - 1)->attgenerated)
		refuse(rel, psprintf("The column \"%s\" is generated.",
							 NameStr(TupleDescAttr(desc, attnum - 1)->attname)),
			   "Change the columns that it is generated from.");
	for (int i = 0; i < desc->natts; i++)
		if (TupleDescAttr(desc, i)->attgenerated == 'v')
			refuse(rel, psprintf("The column \"%s\" is a virtual generated column.",
								 NameStr(TupleDescAttr(desc, i)->attname)),
				   "Use the method three_step.");
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

		if (attnum <= 0 || !TupleDescAttr(RelationGetDescr(rel), attnum - 1)->attnotnull)
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
 * The log has the key alone.  If the column that changes is part of it, the new
 * key must be told by the old one.
 */
static void
refuse_key(Relation rel, AttrNumber attnum, const char *tree)
{
	Oid			index_oid = find_key_index(rel);
	Relation	index;
	Bitmapset  *key = NULL;
	Bitmapset  *reads = NULL;

	if (!OidIsValid(index_oid))
		refuse(rel, "It has no primary key, and no other unique index on columns that are NOT NULL.",
			   "Use the method three_step, or add a primary key.");
	index = index_open(index_oid, AccessShareLock);
	for (int i = 0; i < index->rd_index->indnkeyatts; i++)
		key = bms_add_member(key, index->rd_index->indkey.values[i] - FirstLowInvalidHeapAttributeNumber);
	index_close(index, NoLock);
	if (!bms_is_member(attnum - FirstLowInvalidHeapAttributeNumber, key))
		return;
	pull_varattnos(stringToNode(tree), 1, &reads);
	if (!bms_is_subset(reads, key))
		refuse(rel, "The column is part of its key, and the expression reads columns that are not.",
			   "Use the method three_step.");
}

/* what hangs on the column and ALTER TABLE would refuse, or we could not make again */
static void
refuse_obstacles(Relation rel, AttrNumber attnum, Oid new_type)
{
	Oid			types[] = {OIDOID, INT2OID, OIDOID};
	Datum		v[] = {ObjectIdGetDatum(RelationGetRelid(rel)), Int16GetDatum(attnum), ObjectIdGetDatum(new_type)};

	rm_catalog_query("SELECT kind, name, reason, hint FROM risky_migrations.column_obstacles($1, $2)"
					 /* the column keeps its place, its number and its constraints */
					 " WHERE kind OPERATOR(pg_catalog.<>) ALL (ARRAY['exclusion constraint',"
					 " 'deferrable constraint', 'publication', 'publication column list',"
					 " 'security label', 'column alias list', 'row constructor'])"
					 " UNION ALL SELECT kind, name, reason, hint FROM risky_migrations.column_coercions($1, $2, $3)",
					 3, types, v);
	rm_refuse_obstacles(rm_method_online_rewrite.name, RelationGetRelid(rel), attnum);
}

/*
 * Refuses every table and column that online_rewrite cannot change, before
 * anything is changed.  The caller holds a lock on rel.  Needs SPI.
 */
void
rm_rewrite_refuse(Relation rel, const RmConversionDef *def)
{
	refuse_kind(rel);
	refuse_columns(rel, def->attnum);
	refuse_key(rel, def->attnum, def->tree);
	refuse_obstacles(rel, def->attnum, def->type);
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
int64
rm_rewrite_trigger_mark(const RmMigration *m, Oid relid)
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
 * 55000 if somebody's DDL has changed what the shadow was made for: columns,
 * CHECK constraints, persistence.  The caller holds a lock on rel.
 */
void
rm_rewrite_check_ground(RmMigration *m, RmRewrite *rw, Relation rel)
{
	const char *what = NULL;

	rm_check_owner(m->relid, m->relation);
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(rw->shadow)) ||
		!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(rw->log)))
		what = "The shadow table or the change log has been dropped.";
	else if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(rw->key_index)))
		what = "The index of its key has been dropped.";
	else if (strcmp(rw->ground, ground_of(m->relid)) != 0)
		what = "Its columns or its CHECK constraints are not what they were.";
	if (what)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table %s has been changed while migration %lld was open",
						m->relation, (long long) m->id),
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
 * Why everything has to begin again: changes may have been missed, or rows were
 * rewritten without one.  NULL if all is well.  The caller holds a lock on rel.
 */
const char *
rm_rewrite_missed(RmMigration *m, RmRewrite *rw, Relation rel)
{
	if (rw->trigger_mark != rm_rewrite_trigger_mark(m, m->relid))
		return "the change log was switched off for a while";
	if (m->relfilenode != rel->rd_rel->relfilenode)
		return "the table has other storage";
	if (rw->shadow_storage != rm_relfilenode(rw->shadow))
		return "the shadow table has other storage";
	return NULL;
}

/*
 * The method goes on with the copy, which begins with what "begin" does, when
 * this transaction has committed.  What there is stays until then.
 */
RmStepResult
rm_rewrite_start_over(RmRun *run, const char *why)
{
	ereport(NOTICE,
			(errmsg("migration %lld begins again: %s", (long long) run->migration_id, why)));
	run->m->steps_done = RM_REWRITE_COPY;
	run->m->phase = RM_COPY_FROM_BEGIN;
	return RM_STEP_BACK;
}

/*
 * The table, locked, for a transaction of a step that relies on what "begin" has
 * made.  NULL if everything has to begin again: the step returns RM_STEP_BACK.
 */
Relation
rm_rewrite_open(RmRun *run, RmRewrite *rw, LOCKMODE lock)
{
	Relation	rel;
	const char *missed;

	rm_lock_relation(&run->locks, run->m->relid, lock);
	rel = table_open(run->m->relid, NoLock);
	rm_rewrite_check_ground(run->m, rw, rel);
	missed = rm_rewrite_missed(run->m, rw, rel);
	if (missed == NULL)
		return rel;
	table_close(rel, NoLock);
	(void) rm_rewrite_start_over(run, missed);
	return NULL;
}

/*-------------------------------------------------------------------------
 * begin
 *-------------------------------------------------------------------------
 */

/* what the twin is asked */
typedef struct Twin
{
	RmMigration *m;
	MemoryContext cxt;
	FormData_pg_attribute att;	/* what the column becomes */
	List	   *checks;			/* of char *: name and definition, for ALTER TABLE ... ADD */
} Twin;

static RmTwin
make_twin(RmMigration *m)
{
	/* in pg_temp nobody needs a privilege, and nobody sees it */
	RmTwin		twin = rm_twin_make(m->relid, "pg_temp",
									psprintf("rm_twin_%lld", (long long) m->id),
									psprintf("rm_x_%lld_", (long long) m->id));

	rm_twin_alter_type(&twin, get_attname(m->relid, m->attnum, false), m->new_type,
					   psprintf("(NULL::%s)", m->new_type));
	return twin;
}

static void
ask_twin(void *arg)
{
	Twin	   *t = arg;
	RmTwin		twin = make_twin(t->m);
	Relation	rel = table_open(twin.relid, NoLock);
	AttrNumber	attnum = get_attnum(twin.relid, get_attname(t->m->relid, t->m->attnum, false));
	MemoryContext oldcxt;

	t->att = *TupleDescAttr(RelationGetDescr(rel), attnum - 1);
	table_close(rel, NoLock);
	rm_execute(psprintf("SELECT pg_catalog.quote_ident(n.conname), pg_catalog.pg_get_constraintdef(n.oid)"
						" FROM pg_catalog.pg_constraint n JOIN pg_catalog.pg_constraint o"
						" ON o.conname = n.conname AND o.contype = 'c' AND o.conrelid = %u AND o.convalidated"
						" WHERE n.conrelid = %u AND n.contype = 'c'"
						/* others cannot fail by it; one of the whole row has a 0 here */
						" AND (o.conkey IS NULL OR o.conkey && ARRAY[%d, 0]::int2[]) ORDER BY n.conname",
						t->m->relid, twin.relid, t->m->attnum));
	oldcxt = MemoryContextSwitchTo(t->cxt);
	for (uint64 i = 0; i < SPI_processed; i++)
		t->checks = lappend(t->checks, psprintf("%s %s", rm_result_text(i, 1), rm_result_text(i, 2)));
	MemoryContextSwitchTo(oldcxt);
}

/* reloptions of a relation as they are in pg_class; (Datum) 0 if it has none */
static Datum
reloptions_of(Oid relid)
{
	HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	Datum		options;
	bool		isnull;

	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for relation %u", relid);
	options = SysCacheGetAttr(RELOID, tup, Anum_pg_class_reloptions, &isnull);
	options = isnull ? (Datum) 0 : datumCopy(options, false, -1);
	ReleaseSysCache(tup);
	return options;
}

/* the table's columns, in their places, as they will be */
static TupleDesc
shadow_descriptor(Relation rel, AttrNumber attnum, const FormData_pg_attribute *att)
{
	TupleDesc	desc = CreateTupleDescCopy(RelationGetDescr(rel));
	Form_pg_attribute mine = TupleDescAttr(desc, attnum - 1);

	for (int i = 0; i < desc->natts; i++)
		TupleDescAttr(desc, i)->attnotnull = TupleDescAttr(RelationGetDescr(rel), i)->attnotnull;
	mine->atttypid = att->atttypid;
	mine->atttypmod = att->atttypmod;
	mine->attlen = att->attlen;
	mine->attbyval = att->attbyval;
	mine->attalign = att->attalign;
	mine->attstorage = att->attstorage;
	mine->attcompression = att->attcompression;
	mine->attcollation = att->attcollation;
	mine->attndims = att->attndims;
	for (int i = 0; i < desc->natts; i++)
		rm_attribute_changed(desc, i);
	return desc;
}

static Oid
create_shadow(RmMigration *m, Relation rel, Twin *twin)
{
	Oid			toast = rel->rd_rel->reltoastrelid;
	Datum		options = transformRelOptions(reloptions_of(m->relid),
											  list_make1(makeDefElem("autovacuum_enabled",
																	 (Node *) makeString("false"), -1)),
											  NULL, NULL, false, false);
	ObjectAddress shadow;
	ObjectAddress table;
	ListCell   *lc;

	ObjectAddressSet(shadow, RelationRelationId,
					 heap_create_with_catalog(shadow_name(m->id), get_namespace_oid(RM_SCHEMA, false),
											  rel->rd_rel->reltablespace, InvalidOid, InvalidOid, InvalidOid,
											  rel->rd_rel->relowner, HEAP_TABLE_AM_OID,
											  shadow_descriptor(rel, m->attnum, &twin->att), NIL,
											  RELKIND_RELATION, rel->rd_rel->relpersistence,
											  false, false, ONCOMMIT_NOOP, options, false,
											  true, true, m->relid, NULL));
	CommandCounterIncrement();
	NewHeapCreateToastTable(shadow.objectId, OidIsValid(toast) ? reloptions_of(toast) : (Datum) 0,
							AccessExclusiveLock, OidIsValid(toast) ? toast : m->relid);
	ObjectAddressSet(table, RelationRelationId, m->relid);
	recordDependencyOn(&shadow, &table, DEPENDENCY_AUTO);
	foreach(lc, twin->checks)
		rm_execute(psprintf("ALTER TABLE " RM_SCHEMA ".%s ADD CONSTRAINT %s", shadow_name(m->id),
							(char *) lfirst(lc)));
	return shadow.objectId;
}

static void
create_trigger(RmMigration *m)
{
	const char *rel_sql = rm_relation_sql(m->relid);
	const char *log = quote_identifier(log_trigger_name(m));

	rm_execute(psprintf("CREATE OR REPLACE TRIGGER %s AFTER INSERT OR UPDATE OR DELETE ON %s"
						" FOR EACH ROW EXECUTE FUNCTION " RM_SCHEMA ".log_change(%lld)",
						log, rel_sql, (long long) m->id));
	rm_execute(psprintf("ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %s", rel_sql, log));
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
	ObjectAddressSet(object, RelationRelationId, relid);
	performDeletion(&object, DROP_RESTRICT, PERFORM_DELETION_INTERNAL);
}

/* shadow and log go; what is gone already is no error */
void
rm_rewrite_drop(const RmMigration *m, const RmRewrite *rw)
{
	drop_relation(rw->shadow);
	drop_relation(rw->log);
}

/* the trigger that writes the log, likewise; the caller holds ACCESS EXCLUSIVE */
void
rm_rewrite_drop_trigger(const RmMigration *m)
{
	rm_execute(psprintf("DROP TRIGGER IF EXISTS %s ON %s",
						quote_identifier(log_trigger_name(m)), rm_relation_sql(m->relid)));
}

/* and with them their row of state */
static void
drop_tables(const RmMigration *m, const RmRewrite *rw)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	if (rw == NULL)
		return;
	rm_rewrite_drop(m, rw);
	rm_state_execute("DELETE FROM risky_migrations.rewrite WHERE migration_id = $1",
					 1, types, v, NULL);
	rm_state_execute("DELETE FROM risky_migrations.conversion_error WHERE migration_id = $1",
					 1, types, v, NULL);
}

/*
 * Has the change made on an empty copy of the table: raises what PostgreSQL says
 * of it.  Nothing is left of the copy.  The caller holds a lock on the table.
 * Needs SPI.
 */
static Twin
rehearse_on_twin(RmMigration *m)
{
	Twin		twin = {.m = m,.cxt = CurrentMemoryContext};
	ErrorData  *error = rm_rehearse(ask_twin, &twin, CurrentMemoryContext);

	if (error == NULL)
		return twin;
	if (error->detail == NULL)
		error->detail = psprintf("The change was tried on an empty copy of %s; ALTER TABLE would refuse it too.",
								 m->relation);
	ReThrowError(error);
}

void
rm_rewrite_rehearse(RmMigration *m)
{
	(void) rehearse_on_twin(m);
}

/*
 * The first transaction of "begin": shadow and log, beside everybody.  Whatever
 * there is of an earlier try is dropped.
 */
void
rm_rewrite_make_tables(RmRun *run)
{
	RmMigration *m = run->m;
	RmConversionDef def = {.attnum = m->attnum,.type = m->new_type_id,.tree = m->tree};
	Twin		twin;
	RmRewrite	rw = {.id = m->id};
	Relation	rel;
	Relation	key;

	rm_lock_relation(&run->locks, m->relid, AccessShareLock);
	rel = table_open(m->relid, NoLock);
	rm_check_owner(m->relid, m->relation);
	rm_rewrite_refuse(rel, &def);
	drop_tables(m, rm_rewrite_load(m));
	twin = rehearse_on_twin(m);

	rw.key_index = find_key_index(rel);
	key = index_open(rw.key_index, AccessShareLock);
	rw.shadow = create_shadow(m, rel, &twin);
	rw.shadow_storage = rm_relfilenode(rw.shadow);
	rw.log = rm_log_create(m, rel, key);
	index_close(key, NoLock);
	rw.ground = ground_of(m->relid);
	table_close(rel, NoLock);
	insert_rewrite(&rw);
}

/*
 * The second one, in which nobody writes the table: from here on the log has every
 * change.
 */
void
rm_rewrite_begin_log(RmRun *run)
{
	RmMigration *m = run->m;
	RmRewrite  *rw = rm_rewrite_load(m);
	Relation	rel;

	rm_lock_relation(&run->locks, m->relid, ShareRowExclusiveLock);
	rel = table_open(m->relid, NoLock);
	rm_rewrite_check_ground(m, rw, rel);
	rm_backfill_fix_end(m, rel);
	m->rows_done = 0;
	m->rows_estimated = rel->rd_rel->reltuples > 0 ? (int64) rel->rd_rel->reltuples : 0;
	table_close(rel, NoLock);
	create_trigger(m);
	rw->trigger_mark = rm_rewrite_trigger_mark(m, m->relid);
	take_s0(rw);
	save_s0(rw);
}

static RmStepResult
begin_apply(RmRun *run)
{
	if (run->m->phase == 0)
	{
		rm_rewrite_make_tables(run);
		run->m->phase = 1;
		return RM_STEP_AGAIN;
	}
	rm_rewrite_begin_log(run);
	return RM_STEP_DONE;
}

/* everything of ours goes; the table is what it was all the time */
static RmStepResult
begin_revert(RmRun *run)
{
	RmMigration *m = run->m;

	rm_lock_relation(&run->locks, m->relid, AccessExclusiveLock);
	rm_check_owner(m->relid, m->relation);
	run->old_storage = rm_relation_storage(m->relid);
	rm_rewrite_drop_trigger(m);
	drop_tables(m, rm_rewrite_load(m));
	return RM_STEP_DONE;
}

/* shadow and log, which nobody knows but us: the trigger is not there yet */
static void
begin_abandon(RmMigration *m)
{
	drop_tables(m, rm_rewrite_load(m));
}

const RmStep rm_step_rewrite_begin = {
	.name = "begin",
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
 * index
 *-------------------------------------------------------------------------
 */

/* one index that the changed table will have */
typedef struct Wanted
{
	Oid			original;
	IndexStmt  *stmt;			/* for the shadow */
} Wanted;

/* the step; lives across transactions */
typedef struct IndexWork
{
	char	   *building;		/* name of the table's index, while its like is built */
} IndexWork;

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
		map->attnums[a] = get_attnum(i->m->relid,
									 NameStr(TupleDescAttr(RelationGetDescr(twin), a)->attname));
	table_close(twin, NoLock);
	oldcxt = MemoryContextSwitchTo(i->cxt);
	stmt = generateClonedIndexStmt(makeRangeVar(RM_SCHEMA, shadow_name(i->m->id), -1),
								   index, map, NULL);
	stmt->idxname = shadow_index_name(i->m, original);
	stmt->isconstraint = stmt->excludeOpNames != NIL;
	stmt->primary = false;
	stmt->deferrable = stmt->initdeferred = false;
	MemoryContextSwitchTo(oldcxt);
	free_attrmap(map);
	return stmt;
}

static void
ask_for_indexes(void *arg)
{
	Indexes    *i = arg;
	RmTwin		twin = make_twin(i->m);
	Oid			nspid = get_rel_namespace(twin.relid);
	Relation	rel = table_open(i->m->relid, NoLock);
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
 * The indexes that the shadow is to have, NIL if somebody has just made one.  The
 * columns are locked.
 */
static List *
wanted_indexes(RmMigration *m, RmRewrite *rw)
{
	Indexes		i = {.m = m,.rw = rw,.cxt = CurrentMemoryContext};
	ErrorData  *error = rm_rehearse(ask_for_indexes, &i, CurrentMemoryContext);

	if (error)
		ReThrowError(error);
	return i.changed ? NIL : i.wanted;
}

/* drops those of the shadow's indexes whose original is not there any more */
static void
drop_stale_indexes(RmMigration *m, RmRewrite *rw, List *wanted)
{
	Relation	shadow = table_open(rw->shadow, AccessExclusiveLock);
	List	   *indexes = list_copy(RelationGetIndexList(shadow));
	ListCell   *li;
	ListCell   *lw;

	table_close(shadow, NoLock);
	foreach(li, indexes)
	{
		bool		needed = false;

		foreach(lw, wanted)
			needed |= rm_rewrite_shadow_index(m, ((Wanted *) lfirst(lw))->original) == lfirst_oid(li);
		if (needed)
			continue;
		if (OidIsValid(get_index_constraint(lfirst_oid(li))))
			rm_execute(psprintf("ALTER TABLE " RM_SCHEMA ".%s DROP CONSTRAINT %s",
								shadow_name(m->id), quote_identifier(get_rel_name(lfirst_oid(li)))));
		else
			rm_execute(psprintf("DROP INDEX %s", rm_relation_sql(lfirst_oid(li))));
	}
}

/* does the shadow have all indexes, and are they those of the present definitions? */
bool
rm_rewrite_indexes_complete(RmRun *run)
{
	RmMigration *m = run->m;

	return m->fingerprint != NULL &&
		strcmp(m->fingerprint, rm_catalog_fingerprint(m->relid, CurrentMemoryContext)) == 0;
}

/*
 * One index each transaction.  What was mended since one could not be built is
 * in the log, so that is replayed first.
 */
static RmStepResult
index_apply(RmRun *run)
{
	RmMigration *m = run->m;
	RmRewrite  *rw = rm_rewrite_load(m);
	Relation	rel;
	IndexWork  *work = run->work;
	List	   *wanted;
	ListCell   *lc;
	char	   *fingerprint;
	int			built = 0;

	rel = rm_rewrite_open(run, rw, AccessShareLock);
	if (rel == NULL)
		return RM_STEP_BACK;
	/* what changes after this is seen by those who compare it */
	fingerprint = rm_catalog_fingerprint(m->relid, CurrentMemoryContext);
	if (work == NULL)
	{
		work = run->work = MemoryContextAllocZero(run->cxt, sizeof(IndexWork));
		if (OidIsValid(rm_rewrite_shadow_index(m, rw->key_index)))
		{
			(void) rm_replay(run, rw, rel, NULL);
			table_close(rel, NoLock);
			return RM_STEP_AGAIN;
		}
	}
	table_close(rel, NoLock);
	wanted = wanted_indexes(m, rw);
	if (wanted == NIL)
		return RM_STEP_AGAIN;
	run->progress.blocks_total = list_length(wanted);
	foreach(lc, wanted)
	{
		Wanted	   *w = lfirst(lc);

		if (OidIsValid(rm_rewrite_shadow_index(m, w->original)))
		{
			run->progress.blocks_done = ++built;
			continue;
		}
		/* nobody's DDL is to wait for the building */
		UnlockRelationOid(m->relid, AccessShareLock);
		work->building = MemoryContextStrdup(run->cxt, get_rel_name(w->original));
		(void) rm_define_index(rw->shadow, w->stmt);
		work->building = NULL;
		return RM_STEP_AGAIN;
	}
	drop_stale_indexes(m, rw, wanted);
	m->fingerprint = fingerprint;
	return RM_STEP_DONE;
}

/* tells it of the table's index, not of the shadow's */
static void
index_explain(RmRun *run, ErrorData *error)
{
	IndexWork  *work = run->work;
	MemoryContext oldcxt;

	if (work == NULL || work->building == NULL ||
		(error->sqlerrcode != ERRCODE_UNIQUE_VIOLATION &&
		 error->sqlerrcode != ERRCODE_EXCLUSION_VIOLATION))
		return;
	oldcxt = MemoryContextSwitchTo(run->cxt);
	error->message = psprintf("the new values do not fit index \"%s\"", work->building);
	error->constraint_name = work->building;
	error->hint = psprintf("The old type tells rows apart that the new one does not: mend them, then SELECT rm_resume(%lld); or give it up with CALL rm_rollback(%lld).",
						   (long long) run->migration_id, (long long) run->migration_id);
	MemoryContextSwitchTo(oldcxt);
}

const RmStep rm_step_rewrite_index = {
	.name = "index",
	.throttled = true,
	.writes_pages = true,
	.apply = index_apply,
	.revert = rm_rewrite_nothing,
	.explain = index_explain,
};

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
