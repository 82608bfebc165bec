/*-------------------------------------------------------------------------
 *
 * three_step.c
 *	  The method three_step: a shadow column is added, filled, enforced.
 *
 *	add_column			ACCESS EXCLUSIVE for milliseconds: column and sync
 *						trigger appear in one transaction.  ALTER TABLE waits
 *						for all who have written the table, so whoever writes
 *						it later fires the trigger.
 *	backfill			see backfill.c
 *	enforce_not_null	verifies every row, beside readers and writers;
 *						then ACCESS EXCLUSIVE for milliseconds to add CHECK
 *						(... IS NOT NULL) NOT VALID; VALIDATE CONSTRAINT scans
 *						beside readers and writers; then ACCESS EXCLUSIVE for
 *						milliseconds again: SET NOT NULL believes the proven
 *						constraint and does not scan, and the constraint goes.
 *						Where there are children all that is left to the swap.
 *
 * Transactions that were open before a step and end after it: one that has
 * written the table makes the ALTER wait (bounded).  One that has only read
 * it keeps ACCESS SHARE and does the same.  One that has not touched it yet,
 * under any isolation level, sees the new catalogs when it locks the table,
 * and its writes fire the trigger; a REPEATABLE READ one that updates a row
 * which the backfill has changed since its snapshot gets 40001, as after any
 * concurrent update.
 *
 * What a crash leaves between two commits: a phase in the state row, at which
 * the step goes on.  Verification begins again, since its result is worth
 * only as much as the trigger was watched.
 *
 * Easy to get wrong: SET NOT NULL scans the table under ACCESS EXCLUSIVE
 * unless the CHECK is there and valid, so that is looked up in the same
 * transaction, after the lock; and once the CHECK exists the trigger must
 * raise conversion errors rather than record them (m->enforced).
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/catalog.h"
#include "catalog/dependency.h"
#include "catalog/partition.h"
#include "catalog/pg_am.h"
#include "catalog/pg_class.h"
#include "catalog/pg_constraint.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/defrem.h"
#include "commands/trigger.h"
#include "compat.h"
#include "crew.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "leaves.h"
#include "miscadmin.h"
#include "nodes/nodeFuncs.h"
#include "parser/parse_func.h"
#include "rewrite/prs2lock.h"
#include "risky_migrations.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

/* pages that one transaction of the verification looks at, at most */
#define VERIFY_PAGES 4096
/* and for how long, in milliseconds */
#define VERIFY_TIME 200
/* what is shared out among workers has a multiple of so many */
#define VERIFY_RANGE_PAGES 1024

/* phases of enforce_not_null, in the state row */
enum
{
	ENFORCE_BEGIN,				/* fix what is to be verified */
	ENFORCE_VERIFY,				/* every row, in ranges of pages */
	ENFORCE_ADD_CHECK,			/* CHECK ... NOT VALID, unless a row is wrong */
	ENFORCE_VALIDATE,
	ENFORCE_SET_NOT_NULL,
	ENFORCE_LATE_LEAVES = RM_PHASE_LATE_LEAVES	/* verify those that have come since */
};

static const char *
column_sql(const RmMigration *m, AttrNumber attnum)
{
	return quote_identifier(get_attname(m->relid, attnum, false));
}

/* created_at -> created_at_new, within the length of a name */
char *
rm_shadow_column_name(const char *column)
{
	return makeObjectName(column, NULL, "new");
}

/* created_at -> created_at_old, likewise */
char *
rm_old_column_name(const char *column)
{
	return makeObjectName(column, NULL, "old");
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
			 errmsg("three_step cannot change table \"%s\"",
					RelationGetRelationName(rel)),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

/* triggers that would see or spoil what the sync trigger does */
static void
refuse_triggers(Relation rel)
{
	TriggerDesc *desc = rel->trigdesc;

	for (int i = 0; desc && i < desc->numtriggers; i++)
	{
		Trigger    *t = &desc->triggers[i];

		if (TRIGGER_FOR_BEFORE(t->tgtype) && TRIGGER_FOR_ROW(t->tgtype) &&
			(TRIGGER_FOR_INSERT(t->tgtype) || TRIGGER_FOR_UPDATE(t->tgtype)) &&
			strncmp(t->tgname, "~rm_sync_", 9) != 0 &&
			strcmp(t->tgname, "~rm_sync_") > 0)
			refuse(rel, psprintf("The trigger \"%s\" would fire after the sync trigger and could change the row again.",
								 t->tgname),
				   "Give it a name that sorts before \"~\".");
	}
}

/* a row's place may not depend on what changes */
static void
refuse_partition_key(Relation rel, AttrNumber attnum)
{
	if (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE &&
		has_partition_attrs(rel, bms_make_singleton(attnum - FirstLowInvalidHeapAttributeNumber), NULL))
		refuse(rel, psprintf("The column \"%s\" is part of its partition key.",
							 get_attname(RelationGetRelid(rel), attnum, false)),
			   "Copy the rows into a table that is partitioned by the new type.");
}

/* tables whose rows cannot be filled in place */
static void
refuse_storage(Relation rel)
{
	if (rel->rd_rel->relam != HEAP_TABLE_AM_OID)
		refuse(rel, "Its table access method is not heap.",
			   "Only tables of the access method heap can be filled in place.");
	if (RelationUsesLocalBuffers(rel))
		refuse(rel, "It is a temporary table.",
			   "Nobody else can be waiting for it: use ALTER TABLE.");
	CheckCmdReplicaIdentity(rel, CMD_UPDATE);
}

/* may the caller make indexes on it? */
static void
refuse_schema(Relation rel)
{
	if (!rm_may_create_in(RelationGetNamespace(rel), GetUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for schema %s",
						get_namespace_name(RelationGetNamespace(rel))),
				 errdetail("Indexes on the new column are made in the schema of the table."),
				 errhint("GRANT CREATE on the schema to the role that runs the migration.")));
}

/* one partition, at any level, of a table whose column is att */
static void
refuse_partition(Relation part, Relation root, Form_pg_attribute att)
{
	AttrNumber	attnum = get_attnum(RelationGetRelid(part), NameStr(att->attname));
	Form_pg_attribute own = TupleDescAttr(RelationGetDescr(part), attnum - 1);

	if (part->rd_rel->relkind == RELKIND_RELATION)
		refuse_storage(part);
	else if (part->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		refuse(part, psprintf("It is a partition of \"%s\", and no ordinary table.",
							  RelationGetRelationName(root)),
			   "Detach it first; its column is changed where it is stored.");
	if (part->rd_rel->relowner != root->rd_rel->relowner)
		refuse(part, psprintf("It is a partition of \"%s\", and has another owner.",
							  RelationGetRelationName(root)),
			   "Give both the same owner.");
	if (own->attnotnull != att->attnotnull)
		refuse(part, psprintf("Its column \"%s\" is NOT NULL, which that of \"%s\" is not.",
							  NameStr(att->attname), RelationGetRelationName(root)),
			   "SET NOT NULL for the partitioned table, or DROP NOT NULL for the partition.");
	refuse_schema(part);
	refuse_triggers(part);
	refuse_partition_key(part, attnum);
}

static Oid
owner_of(Oid relid)
{
	HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	Oid			owner;

	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for relation %u", relid);
	owner = ((Form_pg_class) GETSTRUCT(tup))->relowner;
	ReleaseSysCache(tup);
	return owner;
}

/*
 * One table that inherits the column, at any level, from the table root; also one
 * that has come since the migration began.  Needs a lock on the child.
 */
void
rm_refuse_child(Relation child, Oid root, const char *column)
{
	AttrNumber	attnum = get_attnum(RelationGetRelid(child), column);
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(child), attnum - 1);

	if (child->rd_rel->relkind != RELKIND_RELATION)
		refuse(child, psprintf("It inherits from \"%s\", and is no ordinary table.", get_rel_name(root)),
			   "Take it away first with ALTER TABLE ... NO INHERIT; its column is changed where it is stored.");
	if (RelationUsesLocalBuffers(child))
		refuse(child, psprintf("It inherits from \"%s\", and is a temporary table.", get_rel_name(root)),
			   "Take it away first with ALTER TABLE ... NO INHERIT, or drop it.");
	refuse_storage(child);
	if (child->rd_rel->relowner != owner_of(root))
		refuse(child, psprintf("It inherits from \"%s\", and has another owner.", get_rel_name(root)),
			   "Give both the same owner.");
	if (att->attinhcount > 1)
		refuse(child, psprintf("Its column \"%s\" is inherited from several tables, and ALTER TABLE changes it in all of them or none.",
							   column),
			   "Take it away from all but one of them with ALTER TABLE ... NO INHERIT.");
	if (att->attgenerated)
		refuse(child, psprintf("Its column \"%s\" is generated, which that of \"%s\" is not.",
							   column, get_rel_name(root)),
			   "DROP EXPRESSION for that column, or take the table away with ALTER TABLE ... NO INHERIT.");
	refuse_schema(child);
	refuse_triggers(child);
}

/* names that columns of ours would get */
static void
refuse_names(Relation rel, const char *column, const char *new_column)
{
	const char *const names[] = {new_column, rm_old_column_name(column)};

	for (int i = 0; i < lengthof(names); i++)
		if (get_attnum(RelationGetRelid(rel), names[i]) != InvalidAttrNumber)
			ereport(ERROR,
					(errcode(ERRCODE_DUPLICATE_COLUMN),
					 errmsg("column \"%s\" of relation \"%s\" already exists", names[i],
							RelationGetRelationName(rel)),
					 i == 0 ? errdetail("It is the name that the shadow column would get.") :
					 errdetail("It is the name that the column would get by the swap."),
					 errhint("Rename that column first.")));
}

/*
 * What is refused of a table's partitions or children.  They are opened with a
 * lock that whoever refuses before anything begins may wait for; in the step
 * that adds the column all of them are locked already.
 */
static void
refuse_members(Relation rel, Form_pg_attribute att, const char *new_column)
{
	ListCell   *lc;

	foreach(lc, rm_lock_below(rel))
	{
		Relation	member = relation_open(lfirst_oid(lc), NoLock);

		if (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE)
			refuse_partition(member, rel, att);
		else
		{
			rm_refuse_child(member, RelationGetRelid(rel), NameStr(att->attname));
			refuse_names(member, NameStr(att->attname), new_column);
		}
		relation_close(member, NoLock);
	}
}

/*
 * The table that a column is inherited from, at the top.  One of them, should
 * there be several.
 */
static const char *
origin_of(Oid relid, const char *column)
{
	Oid			types[] = {OIDOID, TEXTOID};
	Datum		v[] = {ObjectIdGetDatum(relid), CStringGetTextDatum(column)};

	rm_catalog_query("SELECT risky_migrations.column_origin($1, $2)", 2, types, v);
	return rm_relation_sql(DatumGetObjectId(rm_result_datum(0, 1)));
}

/*
 * Refuses every table and column that three_step cannot change, before
 * anything is changed.  The caller holds a lock on rel.
 */
void
rm_three_step_refuse(Relation rel, const RmConversionDef *def,
					 const char *new_column)
{
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel), def->attnum - 1);
	Oid			state_nspid = get_rel_namespace(rm_state_relid("migration", false));

	if (rel->rd_rel->relispartition)
		refuse(rel, "It is a partition.", "Name the partitioned table that it belongs to.");
	if (rel->rd_rel->relkind != RELKIND_RELATION &&
		rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		refuse(rel, "It is not an ordinary table.", "Name an ordinary table.");
	if (att->attinhcount > 0)
		refuse(rel, psprintf("Its column \"%s\" is inherited.", NameStr(att->attname)),
			   psprintf("Name the table that it is inherited from: %s.",
						origin_of(RelationGetRelid(rel), NameStr(att->attname))));
	if (rel->rd_rel->relkind == RELKIND_RELATION)
		refuse_storage(rel);
	refuse_members(rel, att, new_column);
	if (IsCatalogRelation(rel) || RelationGetNamespace(rel) == state_nspid)
		refuse(rel, "It is a system catalog, or belongs to this extension.",
			   "Name a table of your own.");
	if (DomainHasConstraints(def->type))
		refuse(rel, psprintf("The type %s is a domain with constraints, and adding a column of it would rewrite the table.",
							 format_type_be(def->type)),
			   "Use the domain's base type, with the domain's CHECK on the column added NOT VALID and validated; or ALTER TABLE where nobody is waiting.");
	refuse_names(rel, NameStr(att->attname), new_column);
	refuse_schema(rel);
	refuse_triggers(rel);
	refuse_partition_key(rel, def->attnum);
}

/*-------------------------------------------------------------------------
 * add_column
 *-------------------------------------------------------------------------
 */

/* the function that sync triggers call */
static Oid
sync_function(void)
{
	return LookupFuncName(list_make2(makeString(RM_SCHEMA), makeString("sync")),
						  0, NULL, false);
}

/*
 * The shadow column is not the extension's any more: DROP EXTENSION leaves it.
 * To be called in the transaction that makes it the table's own.  (Other
 * shadow columns of the table are let go too; they keep their triggers.)
 */
void
rm_release_shadow_column(const RmMigration *m)
{
	ListCell   *lc;

	foreach(lc, rm_tree(m->relid))
		(void) deleteDependencyRecordsForSpecific(RelationRelationId, lfirst_oid(lc),
												  DEPENDENCY_NORMAL,
												  ProcedureRelationId, sync_function());
}

static void
bind_column(const RmMigration *m, Oid relid)
{
	ObjectAddress column;
	ObjectAddress function;

	ObjectAddressSet(function, ProcedureRelationId, sync_function());
	ObjectAddressSubSet(column, RelationRelationId, relid,
						rm_leaf_attnum(m->relid, m->new_attnum, relid));
	recordDependencyOn(&column, &function, DEPENDENCY_NORMAL);
}

/*
 * The shadow column depends on the trigger's function: DROP EXTENSION ...
 * CASCADE, which takes the trigger, takes the column too.  Left behind as NOT
 * NULL, without its trigger, it would make every INSERT fail.  Columns of
 * partitions and children do not go with their parent's that way: each depends
 * by itself.
 */
void
rm_bind_shadow_column(const RmMigration *m)
{
	ListCell   *lc;

	foreach(lc, rm_tree(m->relid))
		bind_column(m, lfirst_oid(lc));
}

/*
 * A table's trigger depends on all that an expression over the root's columns
 * uses, so that nobody drops or changes that without being told.
 */
static void
depend_on_expression(const RmMigration *m, Oid relid, const char *tree)
{
	ObjectAddress trigger;
	Relation	rel;

	if (tree == NULL || m->server_version != PG_VERSION_NUM / 10000)
		return;
	ObjectAddressSet(trigger, TriggerRelationId,
					 get_trigger_oid(relid, rm_trigger_name(m->id), false));
	rel = table_open(relid, NoLock);
	recordDependencyOnSingleRelExpr(&trigger, rm_leaf_expression(stringToNode(tree), m->relid, rel),
									relid, DEPENDENCY_NORMAL, DEPENDENCY_NORMAL, false);
	table_close(rel, NoLock);
}

/* the tables that have a trigger of their own; partitions have their parent's */
static List *
tables_with_trigger(const RmMigration *m)
{
	return rm_is_parted(m) ? list_make1_oid(m->relid) : rm_tree_leaves(m->relid);
}

/*
 * It also depends on what the expression for the way back reads: if that went
 * away unnoticed the old column would not be kept in step any more.
 */
static void
record_reverse_dependencies(const RmMigration *m)
{
	ListCell   *lc;

	foreach(lc, tables_with_trigger(m))
		depend_on_expression(m, lfirst_oid(lc), m->reverse_tree);
}

/* the sync trigger of one table, which is locked */
static void
make_trigger(const RmMigration *m, Oid relid)
{
	const char *rel_sql = rm_relation_sql(relid);
	const char *name = quote_identifier(rm_trigger_name(m->id));
	ObjectAddress trigger;
	ObjectAddress column;

	rm_execute(psprintf("CREATE TRIGGER %s BEFORE INSERT OR UPDATE ON %s"
						" FOR EACH ROW EXECUTE FUNCTION " RM_SCHEMA ".sync(%lld)",
						name, rel_sql, (long long) m->id));
	rm_execute(psprintf("ALTER TABLE %s%s ENABLE ALWAYS TRIGGER %s",
						rm_is_parted(m) ? "" : "ONLY ", rel_sql, name));
	ObjectAddressSet(trigger, TriggerRelationId,
					 get_trigger_oid(relid, rm_trigger_name(m->id), false));
	ObjectAddressSubSet(column, RelationRelationId, relid,
						rm_leaf_attnum(m->relid, m->new_attnum, relid));
	recordDependencyOn(&trigger, &column, DEPENDENCY_NORMAL);
	depend_on_expression(m, relid, m->tree);
}

/*
 * The same of a child that has come since the others got theirs, with all that
 * they have: see rm_leaves_arm().  The caller holds a lock that keeps its writers
 * away.
 */
void
rm_sync_trigger_make(const RmMigration *m, Oid relid)
{
	make_trigger(m, relid);
	depend_on_expression(m, relid, m->reverse_tree);
	if (!m->swapped)
		bind_column(m, relid);
	CommandCounterIncrement();
}

/*
 * The sync triggers go, and the column of that number, from the whole tree.  Whoever
 * inherits a column that he has defined himself too, as he must who comes with ALTER
 * TABLE ... INHERIT, keeps it when the parent's is dropped.  The tree is locked; what
 * somebody else has dropped already is no error.
 */
void
rm_drop_trigger_and_column(const RmMigration *m, AttrNumber attnum)
{
	HeapTuple	att;
	char	   *column;
	ListCell   *lc;

	foreach(lc, tables_with_trigger(m))
		rm_execute(psprintf("DROP TRIGGER IF EXISTS %s ON %s",
							quote_identifier(rm_trigger_name(m->id)),
							rm_relation_sql(lfirst_oid(lc))));
	att = SearchSysCacheAttNum(m->relid, attnum);	/* NULL if dropped */
	if (!HeapTupleIsValid(att))
		return;
	column = pstrdup(NameStr(((Form_pg_attribute) GETSTRUCT(att))->attname));
	ReleaseSysCache(att);
	foreach(lc, rm_tree(m->relid))
		if (get_attnum(lfirst_oid(lc), column) != InvalidAttrNumber)
			rm_execute(psprintf("ALTER TABLE %s DROP COLUMN %s", rm_relation_sql(lfirst_oid(lc)),
								quote_identifier(column)));
}

/* shadow column and sync trigger, in this one transaction */
static void
make_column_and_trigger(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;
	ListCell   *lc;

	rm_execute(psprintf("%s ADD COLUMN %s %s", rm_alter_sql(m),
						quote_identifier(m->new_column), m->new_type));
	m->new_attnum = get_attnum(m->relid, m->new_column);
	foreach(lc, tables_with_trigger(m))
		make_trigger(m, lfirst_oid(lc));
	rm_bind_shadow_column(m);
	CommandCounterIncrement();

	m->rows_done = 0;
	m->by_leaf = false;
	if (rm_is_parted(m) || list_length(rm_tree(m->relid)) > 1)
	{
		rm_leaves_begin(m);
		return;
	}
	rel = table_open(m->relid, NoLock);
	rm_backfill_fix_end(m, rel);
	table_close(rel, NoLock);
}

/* both gone again */
static void
drop_column_and_trigger(RmRun *run)
{
	RmMigration *m = run->m;

	rm_drop_trigger_and_column(m, m->new_attnum);
	m->new_attnum = 0;
	m->enforced = false;
}

/* what earlier tries have written down about rows is of no use any more */
void
rm_forget_rows(RmMigration *m)
{
	rm_ranges_forget(m);
	rm_forget_skipped_rows(m);
	rm_forget_failures(m);
}

/* what parse_reverse() is given, and its result */
typedef struct Reverse
{
	const RmMigration *m;
	MemoryContext cxt;
	char	   *tree;
} Reverse;

/*
 * Parses the expression for the way back.  It speaks of the new column by the
 * old one's name, so the columns are renamed for it; that is undone.
 */
static void
parse_reverse(void *arg)
{
	Reverse    *r = arg;
	const RmMigration *m = r->m;
	const char *alter = rm_alter_sql(m);
	Form_pg_attribute att;
	Relation	rel;
	char	   *tree;

	/* a cast of the one value does not tell what was in the others */
	if (m->reverse_expr == NULL && m->server_version == PG_VERSION_NUM / 10000 &&
		rm_reads_other_columns(m))
		return;
	rm_execute(psprintf("%s RENAME COLUMN %s TO %s", alter,
						quote_identifier(m->column), quote_identifier(m->old_column)));
	rm_execute(psprintf("%s RENAME COLUMN %s TO %s", alter,
						quote_identifier(m->new_column), quote_identifier(m->column)));
	CommandCounterIncrement();
	rel = table_open(m->relid, NoLock);
	att = TupleDescAttr(RelationGetDescr(rel), m->attnum - 1);
	tree = rm_conversion_parse_reverse(rel, m->column, m->reverse_expr,
									   att->atttypid, att->atttypmod);
	table_close(rel, NoLock);
	if (tree)
		r->tree = MemoryContextStrdup(r->cxt, tree);
}

static int64
estimate_rows(const RmMigration *m)
{
	ListCell   *lc;
	double		sum = 0;

	foreach(lc, rm_tree_leaves(m->relid))
	{
		Relation	rel = table_open(lfirst_oid(lc), NoLock);
		BlockNumber pages;
		double		tuples;
		double		allvisfrac;

		table_relation_estimate_size(rel, NULL, &pages, &tuples, &allvisfrac);
		sum += tuples;
		table_close(rel, NoLock);
	}
	return (int64) sum;
}

static RmStepResult
add_column_apply(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;
	RmConversionDef def = {.attnum = m->attnum,.type = m->new_type_id};
	Reverse		reverse = {.m = m,.cxt = CurrentMemoryContext};
	RmExchange *exchange = rm_swap_to_be_rehearsed(m);
	ErrorData  *error;

	rm_lock_tree(run, AccessExclusiveLock);
	rel = table_open(m->relid, NoLock);
	rm_check_ground(m, rel);
	rm_check_owner(m->relid, m->relation);
	rm_three_step_refuse(rel, &def, m->new_column);
	rm_refuse_relatives(m->relid);
	run->old_storage = rm_relation_storage(m->relid);
	table_close(rel, NoLock);
	m->rows_estimated = estimate_rows(m);

	make_column_and_trigger(run);
	error = rm_rehearse(parse_reverse, &reverse, CurrentMemoryContext);
	if (error)
		ReThrowError(error);
	m->reverse_tree = reverse.tree;
	if (m->reverse_tree)
		rm_refuse_entangled(m->relid, m->attnum, m->reverse_tree);
	record_reverse_dependencies(m);
	if (exchange)
		rm_swap_rehearse(run, exchange);
	return RM_STEP_DONE;
}

static RmStepResult
add_column_revert(RmRun *run)
{
	rm_lock_tree(run, AccessExclusiveLock);
	rm_check_owner(run->m->relid, run->m->relation);
	run->old_storage = rm_relation_storage(run->m->relid);
	drop_column_and_trigger(run);
	rm_forget_rows(run->m);
	rm_leaves_forget(run->m);
	return RM_STEP_DONE;
}

/* the shadow column has got another number: its own in the tree follows */
static bool
renumber_walker(Node *node, void *context)
{
	AttrNumber *numbers = context;

	if (node == NULL)
		return false;
	if (IsA(node, Var) && ((Var *) node)->varattno == numbers[0])
	{
		((Var *) node)->varattno = numbers[1];
		((Var *) node)->varattnosyn = numbers[1];
	}
	return expression_tree_walker(node, renumber_walker, context);
}

/*
 * Back to the empty shadow column.  Dropping and adding it takes milliseconds
 * whatever the size; setting every row to NULL would be another backfill.
 */
RmStepResult
rm_backfill_revert(RmRun *run)
{
	RmMigration *m = run->m;
	AttrNumber	numbers[2] = {m->new_attnum, 0};

	rm_lock_tree(run, AccessExclusiveLock);
	rm_check_owner(run->m->relid, run->m->relation);
	run->old_storage = rm_relation_storage(run->m->relid);
	drop_column_and_trigger(run);
	rm_forget_rows(run->m);
	make_column_and_trigger(run);
	if (m->reverse_tree && m->server_version == PG_VERSION_NUM / 10000)
	{
		Node	   *tree = stringToNode(m->reverse_tree);

		numbers[1] = m->new_attnum;
		(void) renumber_walker(tree, numbers);
		m->reverse_tree = nodeToString(tree);
	}
	record_reverse_dependencies(m);
	return RM_STEP_DONE;
}

const RmStep rm_step_add_column = {
	.name = "add_column",
	.apply = add_column_apply,
	.revert = add_column_revert,
};

/*-------------------------------------------------------------------------
 * enforce_not_null
 *-------------------------------------------------------------------------
 */

/* the verification; lives across transactions */
typedef struct Enforce
{
	int64		checked;		/* rows, committed */
	int64		failures;		/* rows that do not convert */
	int64		nulled;			/* the same, accepted as NULL */
	int64		mended;			/* rows that were not equal */
	bool		begun;			/* its first transaction has committed */
	bool		converting;
	bool		careful;
	bool		nullable;		/* the old column, of the leaf under way, allows NULL */
	bool		not_null_later; /* see takes_not_null_later() */
	bool		validating;		/* VALIDATE CONSTRAINT is under way */
	bool		invalid;		/* ... and has found a row */
	int64		xact_checked;
	int64		xact_failures;
	int64		xact_nulled;
	int64		xact_mended;
} Enforce;

/* OID of our CHECK constraint on relid if it is there; is it proven? */
static Oid
find_check_of(const RmMigration *m, Oid relid, bool *valid)
{
	Oid			oid = get_relation_constraint_oid(relid, rm_check_name(m), true);
	HeapTuple	tup;

	*valid = false;
	if (!OidIsValid(oid))
		return InvalidOid;
	tup = SearchSysCache1(CONSTROID, ObjectIdGetDatum(oid));
	if (!HeapTupleIsValid(tup))
		return InvalidOid;
	*valid = ((Form_pg_constraint) GETSTRUCT(tup))->convalidated;
	ReleaseSysCache(tup);
	return oid;
}

/* a leaf where it is not proven yet */
static Oid
find_unproven(const RmMigration *m)
{
	ListCell   *lc;
	bool		valid;

	foreach(lc, rm_tree_leaves(m->relid))
		if (OidIsValid(find_check_of(m, lfirst_oid(lc), &valid)) && !valid)
			return lfirst_oid(lc);
	return InvalidOid;
}

/* the same of the table; proven only if all its leaves' are */
static Oid
find_check(const RmMigration *m, bool *valid)
{
	ListCell   *lc;
	Oid			oid = InvalidOid;

	*valid = true;
	foreach(lc, rm_tree_leaves(m->relid))
	{
		bool		leaf_valid;

		oid = find_check_of(m, lfirst_oid(lc), &leaf_valid);
		if (!OidIsValid(oid))
			break;
		*valid &= leaf_valid;
	}
	/* a partitioned table may have no leaves at all */
	if (rm_is_parted(m) && (oid != InvalidOid || rm_tree_leaves(m->relid) == NIL))
		oid = get_relation_constraint_oid(m->relid, rm_check_name(m), true);
	return oid;
}

/* it goes, if it is there, from all leaves */
static void
drop_check(const RmMigration *m)
{
	if (OidIsValid(get_relation_constraint_oid(m->relid, rm_check_name(m), true)))
		rm_execute(psprintf("%s DROP CONSTRAINT %s", rm_alter_sql(m),
							quote_identifier(rm_check_name(m))));
}

bool
rm_is_not_null(Oid relid, AttrNumber attnum)
{
	HeapTuple	tup = SearchSysCache2(ATTNUM, ObjectIdGetDatum(relid),
									  Int16GetDatum(attnum));
	bool		result;

	if (!HeapTupleIsValid(tup))
		return false;
	result = ((Form_pg_attribute) GETSTRUCT(tup))->attnotnull;
	ReleaseSysCache(tup);
	return result;
}

/* the expression gives NULL in a row whose old column may not be NULL */
static void
refuse_null(RmRun *run, RmRows *rows)
{
	ErrorData	error = {0};

	error.sqlerrcode = ERRCODE_NOT_NULL_VIOLATION;
	error.message = "the expression gives NULL for this value";
	rm_row_record_failure(rows, &error);
	((Enforce *) run->work)->xact_failures++;
}

/* on_error => 'null', which a NOT NULL of the old column rules out */
static bool
accepts_null(const RmRun *run)
{
	return run->m->null_on_error && ((Enforce *) run->work)->nullable;
}

/* one row: is the new value equal to the expression's?  If not, mend it */
static void
verify_row(RmRun *run, RmRows *rows)
{
	Enforce    *e = run->work;
	Datum		value;
	Datum		present;
	bool		isnull;
	bool		present_isnull;
	ErrorData  *error;
	bool		converted;
	bool		hot;

	e->xact_checked++;
	e->converting = true;
	converted = rm_row_convert(rows, e->careful, &value, &isnull, &error);
	e->converting = false;
	if (!converted)
	{
		rm_row_record_failure(rows, error);
		if (!accepts_null(run))
		{
			e->xact_failures++;
			return;
		}
		e->xact_nulled++;
		value = (Datum) 0;
		isnull = true;
	}
	present = rm_row_target(rows, &present_isnull);
	if (isnull == present_isnull &&
		(isnull || datum_image_eq(value, present, rows->conv->typbyval,
								  rows->conv->typlen)))
	{
		if (isnull && !e->nullable)
			refuse_null(run, rows);
		return;
	}
	(void) rm_row_make(rows, value, isnull);
	switch (rm_row_store(rows, false, &hot))
	{
		case TM_Ok:
			e->xact_mended++;
			break;
		case TM_Updated:
		case TM_Deleted:
			break;				/* the trigger has converted its successor */
		default:
			/* never wait for a row while others are locked: again, later */
			ereport(ERROR,
					(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
					 errmsg("row %s of %s is locked by another transaction",
							rm_row_key(rows->rel, rows->slot), run->relation),
					 errdetail("It has to be mended, and is not waited for while others are locked."),
					 errhint("Call it again when that transaction has ended.")));
	}
}

/* one transaction's worth of the range under way */
static void
verify_range(RmRun *run, Relation rel)
{
	RmRange    *range = &run->range;
	RmRows	   *rows = rm_rows_open(run->m, rel, RM_ROWS_MANY);
	BlockNumber end = Min(range->end_block, RelationGetNumberOfBlocks(rel));
	BlockNumber block = range->next_block;
	BlockNumber stop = Min((int64) end, range->next_block + VERIFY_PAGES);
	instr_time	started;
	Enforce    *e = run->work;

	INSTR_TIME_SET_CURRENT(started);
	while (block < stop)
	{
		OffsetNumber offsets[MaxHeapTuplesPerPage];
		Buffer		buf;
		int			n;
		int			dead;

		CHECK_FOR_INTERRUPTS();
		buf = ReadBuffer(rel, block++);
		n = rm_rows_on_page(rows, buf, false, offsets, &dead);
		for (int i = 0; i < n; i++)
		{
			rm_row_get(rows, buf, offsets[i]);
			verify_row(run, rows);
		}
		ReleaseBuffer(buf);
		/* a row that was mended is locked: commit soon */
		if (e->xact_mended > 0 || rm_elapsed_ms(started) > VERIFY_TIME)
			break;
	}
	range->next_block = block >= end ? range->end_block : block;
	rm_rows_close(rows);
}

/* what the transaction has found is the range's, from where it will be gathered */
static void
count_in_range(RmRun *run)
{
	Enforce    *e = run->work;
	RmRange    *range = &run->range;

	range->rows_checked += e->xact_checked;
	range->rows_changed += e->xact_mended;
	range->rows_failed += e->xact_failures;
	range->rows_nulled += e->xact_nulled;
	run->rows_changed += e->xact_mended;
	e->xact_checked = e->xact_failures = e->xact_nulled = e->xact_mended = 0;
}

/* all ranges are done */
static void
gather_ranges(RmRun *run)
{
	Enforce    *e = run->work;
	const RmRangeSums *sums = rm_ranges_sum(run, true);

	e->xact_checked = sums->rows_checked;
	e->xact_mended = sums->rows_changed;
	e->xact_failures = sums->rows_failed;
	e->xact_nulled = sums->rows_nulled;
	run->m->next_block = run->m->end_block;
	rm_ranges_forget(run->m);
}

/* one transaction's worth of the pages, alone or beside helpers */
static void
verify_pages(RmRun *run, Relation rel)
{
	RmMigration *m = run->m;
	int			workers = rm_workers_for(m->end_block - m->next_block, VERIFY_RANGE_PAGES);

	run->helpers = workers - 1;
	if (m->ranges == 0 && workers > 1)
	{
		/* no more in this transaction: helpers can begin with the next one */
		rm_ranges_cut(run, RelationGetRelid(rel), workers, VERIFY_RANGE_PAGES);
		return;
	}
	if (m->ranges == 0)
	{
		rm_range_whole(run);
		verify_range(run, rel);
		m->next_block = run->range.next_block;
		run->rows_changed += ((Enforce *) run->work)->xact_mended;
		return;
	}
	switch (rm_range_take(run))
	{
		case RM_RANGE_TAKEN:
			verify_range(run, rel);
			count_in_range(run);
			rm_range_save(run);
			break;
		case RM_RANGE_NONE_FREE:
			rm_range_wait(run);
			break;
		case RM_RANGE_ALL_DONE:
			gather_ranges(run);
			break;
	}
}

static void
refuse_wrong_rows(RmRun *run)
{
	Enforce    *e = run->work;

	if (e->failures > 0)
		ereport(ERROR,
				(errcode(ERRCODE_NOT_NULL_VIOLATION),
				 errmsg_plural("%lld row of %s has no new value",
							   "%lld rows of %s have no new value",
							   (unsigned long) e->failures, (long long) e->failures,
							   run->relation),
				 errdetail("Column \"%s\" has values that do not convert; %lld rows were checked. Nothing has been enforced.",
						   run->m->column, (long long) e->checked),
				 errhint("SELECT * FROM rm_conversion_errors; mend these rows, they are converted as they are written, then call it again.")));
}

/* has a writer recorded a value that does not convert, since rm_forget_rows()? */
static bool
failures_recorded(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("SELECT 1 FROM risky_migrations.conversion_error"
					 " WHERE migration_id = $1 LIMIT 1", 1, types, v, NULL);
	return SPI_processed > 0;
}

/* from the commit on, all sessions' triggers raise or record what fails */
static void
set_enforced(RmMigration *m, bool enforced)
{
	m->enforced = enforced;
	rm_invalidate_tree(m);
}

/* from the first row on; nothing that was verified before counts */
static void
begin_verification(RmRun *run)
{
	RmMigration *m = run->m;
	Enforce    *e = run->work;

	e->nullable = !rm_is_not_null(m->relid, m->attnum);
	m->trigger_xmin = rm_trigger_xmin(m);
	rm_forget_rows(m);
	if (m->by_leaf)
		rm_leaves_reset(m);
	e->checked = e->failures = e->nulled = e->mended = 0;
	m->phase = ENFORCE_VERIFY;
}

/* what was verified is not enough, look again: all of it, or the leaves concerned */
static void
verify_again(RmMigration *m)
{
	if (!m->by_leaf)
	{
		m->phase = ENFORCE_BEGIN;
		return;
	}
	rm_leaves_check_again(m);
	m->leaf = InvalidOid;
	m->phase = ENFORCE_VERIFY;
}

/*
 * Where there are leaves, and the tree is locked: has each been verified with the
 * trigger that it has now?
 */
static bool
leaves_verified(RmMigration *m)
{
	if (!m->by_leaf)
		return true;
	rm_leaves_check_again(m);
	if (!rm_leaves_done(m))
		return false;
	m->trigger_xmin = rm_trigger_xmin(m);
	return true;
}

/*
 * Would NOT NULL on the shadow column refuse others' writes?  A child that is made
 * in the middle of the migration inherits it, but has no trigger yet.  So where there
 * are children it is set in the exchange, proven by a CHECK for each of them
 * (NO INHERIT) like other constraints of the column.
 */
static bool
takes_not_null_later(const RmMigration *m)
{
	return m->by_leaf && !rm_is_parted(m);
}

/* the same where what was verified could not be enforced: not for ever */
static void
begin_again_for_change(RmRun *run)
{
	rm_begin_again(run, psprintf("Each time the sync trigger or a constraint of the migration has been changed on %s meanwhile, or a table below it has come or been away.",
								 run->m->relation));
	verify_again(run->m);
}

static void
begin_again_for_value(RmRun *run)
{
	rm_begin_again(run, psprintf("Each time a value of column \"%s\" of %s that does not convert has been written meanwhile; rm_conversion_errors shows the last ones.",
								 run->m->column, run->m->relation));
	run->m->phase = ENFORCE_BEGIN;
}

/* the part without strong locks: every row equals the expression's value */
static void
verify(RmRun *run, Relation rel)
{
	RmMigration *m = run->m;
	Enforce    *e = run->work;
	BlockNumber end;

	e->nullable = !rm_is_not_null(RelationGetRelid(rel),
									  rm_leaf_attnum(m->relid, m->attnum, RelationGetRelid(rel)));
	if (m->relfilenode != rel->rd_rel->relfilenode)
	{
		/* rewritten: pages have other numbers */
		if (OidIsValid(m->leaf))
			rm_backfill_fix_end(m, rel);
		else
			m->phase = ENFORCE_BEGIN;
	}
	if (m->phase == ENFORCE_BEGIN)
	{
		begin_verification(run);
		rm_backfill_fix_end(m, rel);
	}
	end = Min(m->end_block, RelationGetNumberOfBlocks(rel));
	if (m->next_block < end)
		verify_pages(run, rel);
	(void) rm_ranges_sum(run, false);
	run->progress.blocks_done = m->next_block + run->range_sums.blocks_done;
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = e->checked + e->xact_checked + run->range_sums.rows_checked;
	run->progress.rows_total = Max(m->rows_estimated, run->progress.rows_done);
	rm_leaves_progress(run);
	if (m->next_block >= end)
	{
		rm_ranges_forget(m);
		if (OidIsValid(m->leaf))
			rm_leaf_done(m);
		else
			m->phase = ENFORCE_ADD_CHECK;
	}
	if (m->phase != ENFORCE_VERIFY)
		run->helpers = 0;
	run->may_hold = m->phase == ENFORCE_VERIFY;
}

/*
 * One transaction's worth of it.  Leaves come one after the other; a transaction in
 * between chooses the next.
 */
static void
verify_some(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;

	if (m->by_leaf && (m->phase == ENFORCE_BEGIN || !OidIsValid(m->leaf)))
	{
		if (rm_leaves_arm(run))
			return;
		if (m->phase == ENFORCE_BEGIN)
			begin_verification(run);
		rm_ranges_forget(m);
		if (!rm_leaves_choose(run))
		{
			m->phase = ENFORCE_ADD_CHECK;
			run->helpers = 0;
		}
		return;
	}
	rel = rm_leaf_open(run, RowExclusiveLock);
	if (rel == NULL)
		return;					/* no leaf any more: choose another */
	rm_check_owner(m->relid, m->relation);
	/* the trigger was switched off for a moment before we had the lock */
	if (OidIsValid(m->leaf) && m->trigger_xmin != rm_trigger_xmin_of(m, m->leaf))
		m->leaf = InvalidOid;
	else
		verify(run, rel);
	table_close(rel, NoLock);
}

/*
 * The same in a helper.  Whether what it finds is enough is the runner's to
 * know, which watches the trigger.
 */
static void
enforce_help(RmRun *run)
{
	RmMigration *m = run->m;
	Enforce    *e = run->work;
	Relation	rel;

	if (e == NULL)
		e = run->work = MemoryContextAllocZero(run->cxt, sizeof(Enforce));
	e->nullable = !rm_is_not_null(run->range.relid,
									  rm_leaf_attnum(m->relid, m->attnum, run->range.relid));
	e->xact_checked = e->xact_failures = e->xact_nulled = e->xact_mended = 0;
	m->leaf = run->range.relid == m->relid ? InvalidOid : run->range.relid;
	m->relfilenode = run->range.relfilenode;
	rel = rm_leaf_open(run, RowExclusiveLock);
	rm_check_owner(m->relid, m->relation);
	if (rel == NULL || rel->rd_rel->relfilenode != run->range.relfilenode)
		run->pause_ms = RM_LOOK_AT_OTHERS;
	else
	{
		verify_range(run, rel);
		count_in_range(run);
	}
	if (rel)
		table_close(rel, NoLock);
}

/* is the trigger the one that was there when the verification began? */
static bool
trigger_unchanged(const RmMigration *m)
{
	if (!m->by_leaf)
		return m->trigger_xmin == rm_trigger_xmin(m);
	/* until all leaves are verified, each has its own */
	return m->phase <= ENFORCE_ADD_CHECK || m->trigger_xmin == rm_trigger_xmin(m);
}

static RmStepResult
enforce_apply(RmRun *run)
{
	RmMigration *m = run->m;
	Enforce    *e = run->work;
	RmStepResult result = RM_STEP_AGAIN;
	const char *alter;
	Relation	rel;
	bool		valid;
	bool		here = true;
	Oid			leaf = InvalidOid;	/* where the CHECK is to be proven */

	if (e == NULL)
		e = run->work = MemoryContextAllocZero(run->cxt, sizeof(Enforce));
	/* a new run, also after a crash: what was verified then is not enough */
	if (!e->begun && m->phase < ENFORCE_VALIDATE)
		m->phase = ENFORCE_BEGIN;
	if (m->phase == ENFORCE_LATE_LEAVES)
		verify_again(m);
	e->xact_checked = e->xact_failures = e->xact_nulled = e->xact_mended = 0;
	/* nor is it if it was of a table that has got its first child meanwhile */
	if (rm_leaves_discover(m))
		m->phase = ENFORCE_BEGIN;
	/* nor is it if the trigger was switched off for a moment */
	if (m->phase != ENFORCE_BEGIN && !trigger_unchanged(m))
		begin_again_for_change(run);
	if (m->phase <= ENFORCE_VERIFY && !e->invalid)
	{
		verify_some(run);
		return RM_STEP_AGAIN;
	}

	if (m->phase == ENFORCE_VALIDATE && !e->invalid)
	{
		leaf = find_unproven(m);
		if (OidIsValid(leaf) && leaf != m->relid)
			here = rm_lock_relation_if_there(&run->locks, leaf, ShareUpdateExclusiveLock);
		else
			rm_lock_relation(&run->locks, leaf = m->relid, ShareUpdateExclusiveLock);
	}
	else
		rm_lock_tree(run, AccessExclusiveLock);
	rm_check_owner(m->relid, m->relation);
	if (here)
	{
		rel = table_open(OidIsValid(leaf) ? leaf : m->relid, NoLock);
		here = rm_is_leaf_of(rel, m->relid);
		if (here)
			rm_check_ground(rm_migration_on(m, rel), rel);
		table_close(rel, NoLock);	/* ALTER TABLE wants it closed, but locked */
	}

	if (!here || !trigger_unchanged(m))
	{
		begin_again_for_change(run);	/* just now, before we had the lock */
		return RM_STEP_AGAIN;
	}
	alter = rm_alter_sql(m);
	e->nullable = !rm_is_not_null(m->relid, m->attnum);
	e->not_null_later = takes_not_null_later(m);
	if (!OidIsValid(leaf))
		run->old_storage = rm_relation_storage(m->relid);
	if (e->invalid)
	{
		/* a row without a value has come in: take the CHECK back, look again */
		if (OidIsValid(find_check(m, &valid)))
			rm_execute(psprintf("%s DROP CONSTRAINT %s", alter,
								quote_identifier(rm_check_name(m))));
		set_enforced(m, false);
		m->phase = ENFORCE_BEGIN;
		return RM_STEP_AGAIN;
	}
	switch (m->phase)
	{
		case ENFORCE_ADD_CHECK:
			if (!leaves_verified(m))
			{
				begin_again_for_change(run);	/* one was attached since we passed by */
				break;
			}
			refuse_wrong_rows(run);
			if (accepts_null(run))
				return RM_STEP_DONE;	/* and no write fails later, either */
			if (failures_recorded(m))
			{
				begin_again_for_value(run); /* by a writer, since we passed by */
				break;
			}
			set_enforced(m, true);
			if (e->not_null_later)
				drop_check(m);	/* of a time when there were no children */
			if (e->nullable || e->not_null_later)
				return RM_STEP_DONE;
			if (!OidIsValid(find_check(m, &valid)))
				rm_execute(psprintf("%s ADD CONSTRAINT %s CHECK (%s IS NOT NULL) NOT VALID",
									alter, quote_identifier(rm_check_name(m)),
									column_sql(m, m->new_attnum)));
			m->phase = ENFORCE_VALIDATE;
			break;

		case ENFORCE_VALIDATE:
			if (!OidIsValid(find_check(m, &valid)))
			{
				m->phase = ENFORCE_BEGIN;	/* somebody has dropped it */
				set_enforced(m, false);
				break;
			}
			e->validating = true;
			if (leaf == find_unproven(m))
				rm_execute(psprintf("ALTER TABLE ONLY %s VALIDATE CONSTRAINT %s",
									rm_relation_sql(leaf), quote_identifier(rm_check_name(m))));
			e->validating = false;
			if (!OidIsValid(find_unproven(m)))
				m->phase = ENFORCE_SET_NOT_NULL;
			break;

		case ENFORCE_SET_NOT_NULL:
			if (!OidIsValid(find_check(m, &valid)) || !valid)
			{
				m->phase = ENFORCE_BEGIN;
				set_enforced(m, false);
				break;
			}
			rm_execute(psprintf("%s ALTER COLUMN %s SET NOT NULL",
								alter, column_sql(m, m->new_attnum)));
			rm_execute(psprintf("%s DROP CONSTRAINT %s", alter,
								quote_identifier(rm_check_name(m))));
			result = RM_STEP_DONE;
			break;
	}
	return result;
}

static void
enforce_committed(RmRun *run, RmStepResult result)
{
	Enforce    *e = run->work;
	char		checked[32];

	if (run->revert)
		return;
	e->begun = true;
	e->invalid = false;
	e->checked += e->xact_checked;
	e->failures += e->xact_failures;
	e->nulled += e->xact_nulled;
	e->mended += e->xact_mended;
	e->xact_checked = e->xact_failures = e->xact_nulled = e->xact_mended = 0;
	if (result != RM_STEP_DONE)
		return;
	if (e->nulled > 0)
		ereport(NOTICE,
				(errmsg_plural("%lld value of %s does not convert and is NULL",
							   "%lld values of %s do not convert and are NULL",
							   (unsigned long) e->nulled, (long long) e->nulled,
							   run->relation),
				 errhint("SELECT * FROM rm_conversion_errors shows them.")));
	rm_format_count(checked, sizeof(checked), e->checked);
	if (e->nullable)
		ereport(NOTICE,
				(errmsg("%s rows of %s verified equal, %lld mended; the old column allows NULL, and so does the new one",
						checked, run->relation, (long long) e->mended)));
	else
		ereport(NOTICE,
				(errmsg(e->not_null_later ?
						"%s rows of %s verified equal, %lld mended; the new column becomes NOT NULL in the swap" :
						"%s rows of %s verified equal, %lld mended; the new column is NOT NULL",
						checked, run->relation, (long long) e->mended)));
}

static bool
enforce_retry(RmRun *run, ErrorData *error)
{
	Enforce    *e = run->work;

	if (e == NULL)
		return false;
	if (e->validating && error->sqlerrcode == ERRCODE_CHECK_VIOLATION)
	{
		e->validating = false;
		e->invalid = true;
		return true;
	}
	e->validating = false;
	if (!e->converting || e->careful ||
		!rm_is_conversion_failure(error->sqlerrcode))
		return false;
	e->converting = false;
	e->careful = true;
	return true;
}

static RmStepResult
enforce_revert(RmRun *run)
{
	RmMigration *m = run->m;

	rm_lock_tree(run, AccessExclusiveLock);
	rm_check_owner(m->relid, m->relation);
	run->old_storage = rm_relation_storage(m->relid);
	drop_check(m);
	if (rm_is_not_null(m->relid, m->new_attnum))
		rm_execute(psprintf("%s ALTER COLUMN %s DROP NOT NULL",
							rm_alter_sql(m), column_sql(m, m->new_attnum)));
	set_enforced(m, false);
	return RM_STEP_DONE;
}

const RmStep rm_step_enforce_not_null = {
	.name = "enforce_not_null",
	.throttled = true,
	.apply = enforce_apply,
	.revert = enforce_revert,
	.committed = enforce_committed,
	.retry = enforce_retry,
	.help = enforce_help,
};

static const RmStep *const steps[] = {
	[RM_ADD_COLUMN] = &rm_step_add_column,
	[RM_BACKFILL] = &rm_step_backfill,
	[RM_ENFORCE_NOT_NULL] = &rm_step_enforce_not_null,
	[RM_BUILD] = &rm_step_build,
	[RM_SWAP] = &rm_step_swap,
	[RM_CLEANUP] = &rm_step_cleanup,
};

const RmMethod rm_method_three_step = {
	.name = "three_step",
	.steps = steps,
	.nsteps = lengthof(steps),
};
