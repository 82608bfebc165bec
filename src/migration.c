/*-------------------------------------------------------------------------
 *
 * migration.c
 *	  A migration's row of state, and the ground it stands on.
 *
 * The row in risky_migrations.migration says exactly what is done: it is
 * written in the transaction that does it.  In memory it is an RmMigration,
 * loaded anew at the start of every transaction of a step, since a rollback
 * takes the row back but not the memory.
 *
 * Between two transactions of a migration no lock is held, so anybody may
 * change the table in between.  rm_check_ground() is called in each of them,
 * under a lock that keeps DDL away, and stops the migration cleanly when the
 * columns or the sync trigger are not what they were.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "compat.h"
#include "executor/spi.h"
#include "leaves.h"
#include "migration.h"
#include "miscadmin.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/optimizer.h"
#include "risky_migrations.h"
#include "state.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"

/* the method of that name; the state table allows no other */
const RmMethod *
rm_method_by_name(const char *name)
{
	if (strcmp(name, rm_method_direct.name) == 0)
		return &rm_method_direct;
	if (strcmp(name, rm_method_three_step.name) == 0)
		return &rm_method_three_step;
	if (strcmp(name, rm_method_online_rewrite.name) == 0)
		return &rm_method_online_rewrite;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("unknown method \"%s\"", name),
			 errdetail("The row of state was written by another version, or by hand."),
			 errhint("Methods are direct, three_step and online_rewrite.")));
}

/* as in the table steering, where NULL stands for a migration without a row */
RmWanted
rm_wanted_by_name(const char *name)
{
	if (name == NULL || strcmp(name, "run") == 0)
		return RM_WANT_RUN;
	return strcmp(name, "paused") == 0 ? RM_WANT_PAUSED : RM_WANT_CANCELLED;
}

/* the column that the migration's own row tells of; lives as long as m does */
static RmConversionDef *
first_column(const RmMigration *m)
{
	RmConversionDef *c = palloc0(sizeof(RmConversionDef));

	c->relid = m->relid;
	c->attnum = m->attnum;
	c->column = m->column;
	c->old_type = m->old_type_id;
	c->old_type_name = m->old_type;
	c->type = m->new_type_id;
	c->typmod = m->new_typmod;
	c->type_name = m->new_type;
	c->using_expr = m->using_expr;
	c->tree = m->tree;
	c->server_version = m->server_version;
	c->settings = m->settings;
	return c;
}

/* those that change besides the first one; needs SPI */
static List *
load_further_columns(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};
	List	   *list = NIL;
	MemoryContext cxt = CurrentMemoryContext;

	rm_state_execute("SELECT attnum::int8, column_name, old_type, old_type_id::int8, new_type,"
					 " new_type_id::int8, new_typmod::int8, using_expr, conversion_tree"
					 " FROM risky_migrations.further_column WHERE migration_id = $1 ORDER BY number",
					 1, types, v, NULL);
	MemoryContextSwitchTo(cxt); /* SPI leaves its own behind */
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		RmConversionDef *c = palloc0(sizeof(RmConversionDef));

		c->relid = m->relid;
		c->attnum = rm_result_int64(i, 1);
		c->column = rm_result_text(i, 2);
		c->old_type_name = rm_result_text(i, 3);
		c->old_type = rm_result_int64(i, 4);
		c->type_name = rm_result_text(i, 5);
		c->type = rm_result_int64(i, 6);
		c->typmod = rm_result_int64(i, 7);
		c->using_expr = rm_result_text(i, 8);
		c->tree = rm_result_text(i, 9);
		c->server_version = m->server_version;
		c->settings = m->settings;
		list = lappend(list, c);
	}
	return list;
}

static void
insert_further_columns(const RmMigration *m)
{
	Oid			types[] = {INT8OID, INT8OID, INT8OID, TEXTOID, TEXTOID, INT8OID, TEXTOID,
	INT8OID, INT8OID, TEXTOID, TEXTOID};
	Datum		v[lengthof(types)];

	for (int i = 1; i < list_length(m->columns); i++)
	{
		const RmConversionDef *c = list_nth(m->columns, i);
		int			n = 0;

		v[n++] = Int64GetDatum(m->id);
		v[n++] = Int64GetDatum(i + 1);
		v[n++] = Int64GetDatum(c->attnum);
		v[n++] = CStringGetTextDatum(c->column);
		v[n++] = CStringGetTextDatum(c->old_type_name);
		v[n++] = Int64GetDatum(c->old_type);
		v[n++] = CStringGetTextDatum(c->type_name);
		v[n++] = Int64GetDatum(c->type);
		v[n++] = Int64GetDatum(c->typmod);
		v[n++] = CStringGetTextDatum(c->using_expr);
		v[n++] = CStringGetTextDatum(c->tree);
		rm_state_execute("INSERT INTO risky_migrations.further_column (migration_id, number, attnum,"
						 " column_name, old_type, old_type_id, new_type, new_type_id, new_typmod,"
						 " using_expr, conversion_tree)"
						 " VALUES ($1, $2, $3, $4, $5, $6::oid, $7, $8::oid, $9, $10, $11)",
						 lengthof(types), types, v, NULL);
	}
}

/*
 * Loads a migration into cxt, with a lock on its row if it is to be saved.
 * 42704 if there is none.  Needs SPI.
 */
RmMigration *
rm_migration_load(int64 id, bool lock, MemoryContext cxt)
{
	Oid			types[] = {INT8OID};
	Datum		values[] = {Int64GetDatum(id)};
	RmMigration *m;
	MemoryContext oldcxt;
	int			col = 0;

	rm_state_execute(psprintf("SELECT method, state, steps_done::int8, phase::int8, owner::int8,"
					 " relid::int8, relation, attnum::int8, column_name, old_type,"
					 " old_type_id::int8, old_collation, old_storage, old_compression, new_type, new_type_id::int8, new_typmod::int8,"
					 " new_attnum::int8, new_column, using_expr,"
					 " reverse_expr, exact_check, reverse_check, settings, conversion_tree,"
					 " server_version::int8, enforced::int::int8, trigger_xmin,"
					 " by_leaf::int::int8, leaf::int8, relfilenode::int8,"
					 " next_block, end_block, rows_done, rows_estimated, inexact_rows,"
					 " old_column, swapped::int::int8, reverse_tree, fingerprint,"
					 " null_on_error::int::int8, ranges::int8,"
					 " (SELECT wanted FROM risky_migrations.steering WHERE migration_id = migration.id)"
					 " FROM risky_migrations.migration WHERE id = $1 %s",
							  lock ? "FOR NO KEY UPDATE" : ""),
					 1, types, values, NULL);
	if (SPI_processed == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("migration %lld does not exist", (long long) id),
				 errdetail("It has no row of state."),
				 errhint("SELECT * FROM rm_migrations shows them all.")));

	oldcxt = MemoryContextSwitchTo(cxt);
	m = palloc0(sizeof(RmMigration));
	m->id = id;
	m->method = rm_method_by_name(rm_result_text(0, ++col));
	m->state = rm_result_text(0, ++col);
	m->steps_done = rm_result_int64(0, ++col);
	m->phase = rm_result_int64(0, ++col);
	m->owner = rm_result_int64(0, ++col);
	m->relid = rm_result_int64(0, ++col);
	m->relation = rm_result_text(0, ++col);
	m->attnum = rm_result_int64(0, ++col);
	m->column = rm_result_text(0, ++col);
	m->old_type = rm_result_text(0, ++col);
	m->old_type_id = rm_result_int64(0, ++col);
	m->old_collation = rm_result_text(0, ++col);
	m->old_storage = rm_result_text(0, ++col);
	m->old_compression = rm_result_text(0, ++col);
	m->new_type = rm_result_text(0, ++col);
	m->new_type_id = rm_result_int64(0, ++col);
	m->new_typmod = rm_result_int64(0, ++col);
	m->new_attnum = rm_result_int64(0, ++col);
	m->new_column = rm_result_text(0, ++col);
	m->using_expr = rm_result_text(0, ++col);
	m->reverse_expr = rm_result_text(0, ++col);
	m->exact_check = rm_result_text(0, ++col);
	m->reverse_check = rm_result_text(0, ++col);
	m->settings = rm_settings_list(rm_result_datum(0, ++col));
	m->tree = rm_result_text(0, ++col);
	m->server_version = rm_result_int64(0, ++col);
	m->enforced = rm_result_int64(0, ++col) != 0;
	m->trigger_xmin = rm_result_int64(0, ++col);
	m->by_leaf = rm_result_int64(0, ++col) != 0;
	m->leaf = rm_result_int64(0, ++col);
	m->relfilenode = rm_result_int64(0, ++col);
	m->next_block = rm_result_int64(0, ++col);
	m->end_block = rm_result_int64(0, ++col);
	m->rows_done = rm_result_int64(0, ++col);
	m->rows_estimated = rm_result_int64(0, ++col);
	m->inexact_rows = rm_result_int64(0, ++col);
	m->old_column = rm_result_text(0, ++col);
	m->swapped = rm_result_int64(0, ++col) != 0;
	m->reverse_tree = rm_result_text(0, ++col);
	m->fingerprint = rm_result_text(0, ++col);
	m->null_on_error = rm_result_int64(0, ++col) != 0;
	m->ranges = rm_result_int64(0, ++col);
	m->wanted = rm_wanted_by_name(rm_result_text(0, ++col));
	if (m->attnum != InvalidAttrNumber)
		m->columns = list_make1(first_column(m));
	if (m->method != &rm_method_three_step)
		m->columns = list_concat(m->columns, load_further_columns(m));
	MemoryContextSwitchTo(oldcxt);
	return m;
}

static Datum
text_or_null(const char *s, char *null)
{
	*null = s ? ' ' : 'n';
	return s ? CStringGetTextDatum(s) : (Datum) 0;
}

/* a new row of state for m, whose id it sets and returns */
int64
rm_migration_insert(RmMigration *m)
{
	Oid			types[] = {TEXTOID, INT8OID, INT8OID, TEXTOID, INT8OID, TEXTOID,
		TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTARRAYOID,
	TEXTOID, INT8OID, INT8OID, INT8OID, INT8OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID,
	BOOLOID, TEXTOID};
	Datum		v[lengthof(types)];
	char		n[lengthof(types)];
	int			i = 0;

	memset(n, ' ', sizeof(n));
	v[i++] = CStringGetTextDatum(m->method->name);
	v[i++] = Int64GetDatum(m->owner);
	v[i++] = Int64GetDatum(m->relid);
	v[i++] = CStringGetTextDatum(m->relation);
	v[i++] = Int64GetDatum(m->attnum);
	v[i++] = CStringGetTextDatum(m->column);
	v[i++] = CStringGetTextDatum(m->old_type);
	v[i++] = CStringGetTextDatum(m->new_type);
	v[i] = text_or_null(m->new_column, &n[i]), i++;
	v[i++] = CStringGetTextDatum(m->using_expr);
	v[i] = text_or_null(m->reverse_expr, &n[i]), i++;
	v[i] = text_or_null(m->exact_check, &n[i]), i++;
	v[i] = text_or_null(m->reverse_check, &n[i]), i++;
	v[i++] = rm_settings_array(m->settings);
	v[i++] = CStringGetTextDatum(m->tree);
	v[i++] = Int64GetDatum(m->server_version);
	v[i++] = Int64GetDatum(m->old_type_id);
	v[i++] = Int64GetDatum(m->new_type_id);
	v[i++] = Int64GetDatum(m->new_typmod);
	v[i] = text_or_null(m->old_collation, &n[i]), i++;
	v[i] = text_or_null(m->old_storage, &n[i]), i++;
	v[i] = text_or_null(m->old_compression, &n[i]), i++;
	v[i] = text_or_null(m->old_column, &n[i]), i++;
	v[i++] = BoolGetDatum(m->null_on_error);
	v[i] = text_or_null(m->method_reason, &n[i]), i++;

	rm_state_execute("INSERT INTO risky_migrations.migration (method, owner, relid,"
					 " relation, attnum, column_name, old_type, new_type,"
					 " new_column, using_expr, reverse_expr, exact_check,"
					 " reverse_check, settings, conversion_tree, server_version,"
					 " old_type_id, new_type_id, new_typmod, old_collation,"
					 " old_storage, old_compression, old_column, null_on_error,"
					 " method_reason)"
					 " VALUES ($1, $2::oid, $3::oid, $4, $5, $6, $7, $8, $9, $10,"
					 " $11, $12, $13, $14, $15, $16, $17::oid,"
					 " $18::oid, $19, $20, $21, $22, $23, $24, $25) RETURNING id",
					 lengthof(types), types, v, n);
	m->id = rm_result_int64(0, 1);
	m->state = "open";
	insert_further_columns(m);
	return m->id;
}

/* writes what can change while it runs */
void
rm_migration_save(const RmMigration *m)
{
	Oid			types[] = {INT8OID, TEXTOID, INT8OID, INT8OID, INT8OID, BOOLOID,
	INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, BOOLOID,
	TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, OIDOID, INT8OID, BOOLOID};
	Datum		v[lengthof(types)];
	char		n[lengthof(types)];
	int			i = 0;

	memset(n, ' ', sizeof(n));

	v[i++] = Int64GetDatum(m->id);
	v[i++] = CStringGetTextDatum(m->state);
	v[i++] = Int64GetDatum(m->steps_done);
	v[i++] = Int64GetDatum(m->phase);
	v[i++] = Int64GetDatum(m->new_attnum);
	v[i++] = BoolGetDatum(m->enforced);
	v[i++] = Int64GetDatum(m->relfilenode);
	v[i++] = Int64GetDatum(m->next_block);
	v[i++] = Int64GetDatum(m->end_block);
	v[i++] = Int64GetDatum(m->rows_done);
	v[i++] = Int64GetDatum(m->rows_estimated);
	v[i++] = Int64GetDatum(m->inexact_rows);
	v[i++] = Int64GetDatum(m->trigger_xmin);
	v[i++] = BoolGetDatum(m->swapped);
	v[i] = text_or_null(m->reverse_tree, &n[i]), i++;
	v[i] = text_or_null(m->fingerprint, &n[i]), i++;
	v[i++] = CStringGetTextDatum(m->relation);
	v[i++] = CStringGetTextDatum(m->column);
	v[i] = text_or_null(m->new_column, &n[i]), i++;
	v[i++] = ObjectIdGetDatum(m->leaf);
	v[i++] = Int64GetDatum(m->ranges);
	v[i++] = BoolGetDatum(m->by_leaf);
	rm_state_execute("UPDATE risky_migrations.migration SET state = $2,"
					 " steps_done = $3, phase = $4, new_attnum = $5, enforced = $6,"
					 " relfilenode = $7::oid, next_block = $8, end_block = $9,"
					 " rows_done = $10, rows_estimated = $11, inexact_rows = $12,"
					 " trigger_xmin = $13, swapped = $14, reverse_tree = $15,"
					 " fingerprint = $16, relation = $17, column_name = $18,"
					 " new_column = $19, leaf = $20, ranges = $21, by_leaf = $22"
					 " WHERE id = $1",
					 lengthof(types), types, v, n);
}

/*
 * The only open migration of that method (NULL: of any) whose table is the caller's own, or,
 * if there is none, which is and whose table has been dropped.  42704 if there is none
 * either, 42P08 with the list if there are several.
 */
int64
rm_open_migration(const char *method)
{
	Oid			types[] = {TEXTOID, OIDOID};
	Datum		values[2] = {0, ObjectIdGetDatum(GetUserId())};
	char		nulls[2] = {'n', ' '};
	StringInfoData list;

	if (method)
	{
		values[0] = CStringGetTextDatum(method);
		nulls[0] = ' ';
	}
	rm_state_execute("SELECT id, relation, what FROM (SELECT m.id, m.relation,"
					 "  coalesce('column ' || f.column_name, 'written anew') AS what,"
					 "  c.oid IS NOT NULL AS stands, bool_or(c.oid IS NOT NULL) OVER () AS any_stands"
					 " FROM risky_migrations.migration m"
					 " JOIN risky_migrations.migration_columns f ON f.migration_id = m.id"
					 " LEFT JOIN pg_catalog.pg_class c ON c.oid = m.relid"
					 " WHERE m.state = 'open' AND coalesce(m.method = $1, true)"
					 " AND pg_catalog.pg_has_role($2, coalesce(c.relowner, m.owner), 'USAGE')) m"
					 " WHERE stands = any_stands ORDER BY id",
					 2, types, values, nulls);
	if (SPI_processed == 1)
		return rm_result_int64(0, 1);
	if (SPI_processed == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("there is no open migration"),
				 method ? errdetail("None of the method %s is open on a table of yours.", method) :
				 errdetail("None is open on a table of yours."),
				 method ? errhint("Start one with CALL rm_alter_type() or SELECT rm_start(), or step by step with CALL rm_add_column().") :
				 errhint("Start one with CALL rm_alter_type() or SELECT rm_start().")));
	initStringInfo(&list);
	for (uint64 i = 0; i < SPI_processed; i++)
		appendStringInfo(&list, "%s%lld (%s, %s)", i ? ", " : "",
						 (long long) rm_result_int64(i, 1), rm_result_text(i, 2),
						 rm_result_text(i, 3));
	ereport(ERROR,
			(errcode(ERRCODE_AMBIGUOUS_PARAMETER),
			 errmsg("several migrations are open"),
			 errdetail("They are: %s.", list.data),
			 errhint("Give the id of the one that is meant.")));
}

/* a table that was there when the migration began, or when it was planned */
void
rm_refuse_missing(Oid relid)
{
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_TABLE),
			 errmsg("the table of this migration does not exist any more"),
			 errdetail("It had the OID %u.", relid),
			 errhint("Close the migration with CALL rm_rollback() and its id; SELECT * FROM rm_migrations shows it.")));
}

/* 42501 unless the current role owns the table */
void
rm_check_owner(Oid relid, const char *relation)
{
	/* of a superuser nothing is asked */
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
		rm_refuse_missing(relid);
	if (!rm_owns_relation(relid, GetUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be owner of table %s", relation),
				 errdetail("Role \"%s\" is not a member of the role that owns it.",
						   GetUserNameFromId(GetUserId(), false)),
				 errhint("SET ROLE to the owner, or ask the owner to run it.")));
}

/*
 * Name of a migration's sync trigger.  BEFORE triggers fire in the order of
 * their names, byte by byte; '~' sorts after all other ASCII characters.
 */
char *
rm_trigger_name(int64 id)
{
	return psprintf("~rm_sync_%lld", (long long) id);
}

/* the table's present name, quoted, for SQL; 42P01 if it is gone */
const char *
rm_relation_sql(Oid relid)
{
	const char *name = get_rel_name(relid);

	if (name == NULL)
		rm_refuse_missing(relid);
	return quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)), name);
}

/* name of the constraint that proves NOT NULL for a while */
char *
rm_check_name(const RmMigration *m)
{
	return psprintf("rm_not_null_%lld", (long long) m->id);
}

/*
 * Names of what is built on the shadow column (new_side), or for the way back
 * on the old one, begin like this; the OID of the original follows.
 */
char *
rm_built_prefix(const RmMigration *m, bool new_side)
{
	return psprintf("rm_%c_%lld_", new_side ? 'n' : 'o', (long long) m->id);
}

bool
rm_is_built_name(const RmMigration *m, bool new_side, const char *name)
{
	char	   *prefix = rm_built_prefix(m, new_side);

	return strncmp(name, prefix, strlen(prefix)) == 0;
}

/*
 * Has the step after the last one that is done left anything behind?  A cleanup
 * cannot: a phase that is noted there is that of a way back which was interrupted.
 */
bool
rm_step_begun(const RmMigration *m)
{
	if (m->method == &rm_method_three_step && m->steps_done == RM_CLEANUP)
		return false;
	return m->phase != 0 ||
		(m->method == &rm_method_three_step && m->steps_done == RM_BACKFILL &&
		 (m->rows_done > 0 || m->next_block > 0 || m->ranges > 0));
}

/* check_functions_in_node callback: adds who has last written the function */
static bool
add_function(Oid funcid, void *context)
{
	uint64	   *mark = context;
	HeapTuple	tup = SearchSysCache1(PROCOID, ObjectIdGetDatum(funcid));

	if (HeapTupleIsValid(tup))
	{
		*mark = hash_combine64(*mark, HeapTupleHeaderGetRawXmin(tup->t_data));
		ReleaseSysCache(tup);
	}
	return false;
}

static bool
add_functions_walker(Node *node, void *context)
{
	if (node == NULL)
		return false;
	(void) check_functions_in_node(node, add_function, context);
	return expression_tree_walker(node, add_functions_walker, context);
}

/* the transaction that has last written a trigger's row in pg_trigger; 0: none */
TransactionId
rm_trigger_row_xmin(Oid relid, const char *name)
{
	Relation	pg_trigger = table_open(TriggerRelationId, AccessShareLock);
	ScanKeyData keys[2];
	SysScanDesc scan;
	HeapTuple	tup;
	TransactionId xmin = InvalidTransactionId;

	ScanKeyInit(&keys[0], Anum_pg_trigger_tgrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));
	ScanKeyInit(&keys[1], Anum_pg_trigger_tgname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum(name));
	scan = systable_beginscan(pg_trigger, TriggerRelidNameIndexId, true, NULL, 2, keys);
	tup = systable_getnext(scan);
	if (HeapTupleIsValid(tup))
		xmin = HeapTupleHeaderGetRawXmin(tup->t_data);
	systable_endscan(scan);
	table_close(pg_trigger, AccessShareLock);
	return xmin;
}

/* a mark that changes when a function of the migration's expressions is replaced */
uint64
rm_expression_mark(const RmMigration *m)
{
	uint64		mark = 0;
	ListCell   *lc;

	foreach(lc, m->columns)
		if (m->server_version == PG_VERSION_NUM / 10000)
			(void) add_functions_walker(stringToNode(((RmConversionDef *) lfirst(lc))->tree), &mark);
	return mark;
}

/*
 * A mark of what gives a row of a leaf its new value: the transactions that have
 * last written the sync trigger's row in pg_trigger (another one after every
 * DISABLE, ENABLE and re-creation) and the functions that the expression calls; of
 * a child also those that have made it one.  0 if there is no such trigger.
 */
int64
rm_trigger_xmin_of(const RmMigration *m, Oid relid)
{
	TransactionId xmin = rm_trigger_row_xmin(relid, rm_trigger_name(m->id));

	return xmin == InvalidTransactionId ? 0 :
		(int64) hash_combine64(hash_combine64(xmin, rm_expression_mark(m)),
							   rm_leaf_mark(relid, m->relid));
}

/*
 * The same for all rows of the table.  Where there are leaves it also changes when
 * one of them comes or goes.
 */
int64
rm_trigger_xmin(const RmMigration *m)
{
	uint64		mark = 0;
	ListCell   *lc;

	if (!m->by_leaf)
		return rm_trigger_xmin_of(m, m->relid);
	foreach(lc, rm_tree_leaves(m->relid))
	{
		mark = hash_combine64(mark, lfirst_oid(lc));
		mark = hash_combine64(mark, (uint64) rm_trigger_xmin_of(m, lfirst_oid(lc)));
	}
	return (int64) mark;
}

/* columns that an expression, kept as text, reads: as of pull_varattnos() */
static Bitmapset *
columns_of(const char *tree)
{
	Bitmapset  *attnos = NULL;

	pull_varattnos(stringToNode(tree), 1, &attnos);
	return attnos;
}

static bool
uses_column(const char *tree, AttrNumber attnum)
{
	return bms_is_member(attnum - FirstLowInvalidHeapAttributeNumber, columns_of(tree));
}

/* does the migration's expression read other columns than the one that changes? */
bool
rm_reads_other_columns(const RmMigration *m)
{
	Bitmapset  *attnos = columns_of(m->tree);

	return bms_num_members(attnos) > 1 ||
		(!bms_is_empty(attnos) &&
		 !bms_is_member(m->attnum - FirstLowInvalidHeapAttributeNumber, attnos));
}

/*
 * Refuses (55006) a column that another open migration of the table reads, has
 * made, or changes while the expression reads it: of two sync triggers one sees
 * what the other one has not written yet, and after a swap the column of that
 * name is another one.  Needs SPI.
 */
void
rm_refuse_entangled(Oid relid, AttrNumber attnum, const char *tree)
{
	Oid			types[] = {OIDOID, INT8OID};
	Datum		v[] = {ObjectIdGetDatum(relid), Int64GetDatum(PG_VERSION_NUM / 10000)};

	rm_state_execute("SELECT id, attnum::int8, new_attnum::int8, conversion_tree, reverse_tree"
					 " FROM risky_migrations.migration WHERE state = 'open'"
					 " AND method = 'three_step' AND steps_done > 0 AND relid = $1"
					 " AND server_version = $2 ORDER BY id", 2, types, v, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		AttrNumber	its = rm_result_int64(i, 2);
		AttrNumber	its_new = rm_result_int64(i, 3);
		char	   *reverse = rm_result_text(i, 5);

		if (its == attnum)
			continue;			/* the same migration, or refused elsewhere */
		if (its_new == attnum || uses_column(rm_result_text(i, 4), attnum) ||
			(reverse && uses_column(reverse, attnum)) || uses_column(tree, its) ||
			(its_new > 0 && uses_column(tree, its_new)))
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_IN_USE),
					 errmsg("migration %lld of the same table is open",
							(long long) rm_result_int64(i, 1)),
					 errdetail("One of the two migrations reads a column that the other one changes."),
					 errhint("Take that one to its end first, with CALL rm_cleanup(%lld) or CALL rm_rollback(%lld).",
							 (long long) rm_result_int64(i, 1),
							 (long long) rm_result_int64(i, 1))));
	}
}

/*
 * Refuses (55006) a table if another one from which it inherits, or that inherits
 * from it, has an open migration: the shadow column of a parent is one of the child's
 * too, and may be what the child's expression reads.  Needs SPI.
 */
void
rm_refuse_relatives(Oid relid)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(relid)};

	rm_state_execute("SELECT m.id, m.relation FROM risky_migrations.migration m"
					 " WHERE m.state = 'open' AND m.method = 'three_step' AND m.steps_done > 0"
					 " AND m.relid <> $1 AND (m.relid IN (SELECT risky_migrations.members($1))"
					 " OR $1 IN (SELECT risky_migrations.members(m.relid))) ORDER BY m.id LIMIT 1",
					 1, types, v, NULL);
	if (SPI_processed > 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("migration %lld of a table of the same tree is open",
						(long long) rm_result_int64(0, 1)),
				 errdetail("It is of %s; one of the two tables inherits from the other.",
						   rm_result_text(0, 2)),
				 errhint("Take that one to its end first, with CALL rm_cleanup(%lld) or CALL rm_rollback(%lld).",
						 (long long) rm_result_int64(0, 1), (long long) rm_result_int64(0, 1))));
}

/*
 * Constraints of the user's on the shadow column would not be checked by the
 * backfill, and columns generated from it not be computed.
 */
static const char *
find_constraint(const RmMigration *m, TupleDesc desc)
{
	TupleConstr *constr = desc->constr;

	for (int i = 0; constr && i < constr->num_check; i++)
		if (strcmp(constr->check[i].ccname, rm_check_name(m)) != 0 &&
			!rm_is_built_name(m, true, constr->check[i].ccname) &&
			uses_column(constr->check[i].ccbin, m->new_attnum))
			return psprintf("The constraint \"%s\" has been added to the column \"%s\".",
							constr->check[i].ccname, m->new_column);
	for (int i = 0; constr && i < constr->num_defval; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, constr->defval[i].adnum - 1);

		if (att->attgenerated && uses_column(constr->defval[i].adbin, m->new_attnum))
			return psprintf("The column \"%s\" is generated from the column \"%s\".",
							NameStr(att->attname), m->new_column);
	}
	return NULL;
}

/* what is wrong with the columns of the migration, or NULL */
static const char *
find_changed_column(const RmMigration *m, Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);
	Form_pg_attribute att;
	ListCell   *lc;

	foreach(lc, m->columns)
	{
		const RmConversionDef *c = lfirst(lc);
		AttrNumber	attnum = rm_leaf_attnum(m->relid, c->attnum, RelationGetRelid(rel));

		if (attnum <= 0 || attnum > desc->natts || TupleDescAttr(desc, attnum - 1)->attisdropped)
			return psprintf("The column \"%s\" has been dropped.", c->column);
	}
	if (m->new_attnum == 0)
		return NULL;
	att = TupleDescAttr(desc, m->attnum - 1);
	if (att->atttypid != m->old_type_id)
		return psprintf("The column \"%s\" has another type now.", NameStr(att->attname));
	att = m->new_attnum <= desc->natts ? TupleDescAttr(desc, m->new_attnum - 1) : NULL;
	if (att == NULL || att->attisdropped)
		return psprintf("The column \"%s\" has been dropped.", m->new_column);
	if (att->atttypid != m->new_type_id || att->atttypmod != m->new_typmod)
		return psprintf("The column \"%s\" has another type now.", NameStr(att->attname));
	return m->swapped ? NULL : find_constraint(m, desc);
}

/* what is wrong with the sync trigger, or NULL */
static const char *
find_changed_trigger(const RmMigration *m, TriggerDesc *desc)
{
	char	   *name = rm_trigger_name(m->id);
	Trigger    *sync = NULL;

	for (int i = 0; desc && i < desc->numtriggers; i++)
		if (strcmp(desc->triggers[i].tgname, name) == 0)
			sync = &desc->triggers[i];
	if (sync == NULL)
		return psprintf("The sync trigger \"%s\" has been dropped or disabled.", name);
	if (sync->tgenabled != TRIGGER_FIRES_ALWAYS)
		return psprintf("The sync trigger \"%s\" is not enabled ALWAYS any more.", name);
	for (int i = 0; i < desc->numtriggers; i++)
	{
		Trigger    *t = &desc->triggers[i];

		if (TRIGGER_FOR_BEFORE(t->tgtype) && TRIGGER_FOR_ROW(t->tgtype) &&
			(TRIGGER_FOR_INSERT(t->tgtype) || TRIGGER_FOR_UPDATE(t->tgtype)) &&
			t->tgfoid != sync->tgfoid && strcmp(t->tgname, name) > 0)
			return psprintf("The trigger \"%s\" fires after the sync trigger and could change the row again.",
							t->tgname);
	}
	return NULL;
}

/* stops cleanly if somebody's DDL has changed what the migration relies on */
void
rm_check_ground(const RmMigration *m, Relation rel)
{
	const char *broken = find_changed_column(m, rel);

	if (broken == NULL && m->new_attnum != 0)
		broken = find_changed_trigger(m, rel->trigdesc);
	if (broken)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table %s has been changed while migration %lld was open",
						m->relation, (long long) m->id),
				 errdetail("%s", broken),
				 errhint("Undo that change, or give the migration up with CALL rm_rollback(%lld).",
						 (long long) m->id)));
}

/* numbers of a table's columns in relid, which is that table or below it */
List *
rm_attnums_of(List *columns, Oid relid)
{
	List	   *attnums = NIL;
	ListCell   *lc;

	foreach(lc, columns)
	{
		const RmConversionDef *c = lfirst(lc);

		attnums = lappend_int(attnums, rm_leaf_attnum(c->relid, c->attnum, relid));
	}
	return attnums;
}

/* for messages: column "a", or columns "a", "b" */
char *
rm_columns_text(List *columns)
{
	StringInfoData buf;
	ListCell   *lc;

	initStringInfo(&buf);
	appendStringInfoString(&buf, list_length(columns) == 1 ? "column" : "columns");
	foreach(lc, columns)
		appendStringInfo(&buf, "%s \"%s\"", foreach_current_index(lc) ? "," : "",
						 ((RmConversionDef *) lfirst(lc))->column);
	return buf.data;
}

/*
 * What ALTER TABLE has to be told to change all columns of root, by their present
 * names, which they have below it and in a twin too.  emptied: there are no rows, and
 * the expressions do not matter.
 */
char *
rm_alter_clauses(List *columns, Oid root, bool emptied)
{
	StringInfoData buf;
	ListCell   *lc;

	initStringInfo(&buf);
	foreach(lc, columns)
	{
		const RmConversionDef *c = lfirst(lc);

		appendStringInfo(&buf, "%sALTER COLUMN %s TYPE %s USING %s",
						 foreach_current_index(lc) ? ", " : "",
						 quote_identifier(get_attname(root, c->attnum, false)), c->type_name,
						 emptied ? psprintf("(NULL::%s)", c->type_name) : c->using_expr);
	}
	return buf.data;
}

/* makes it ready, or raises 55000 if there is none any more */
static RmConversion *
prepare_conversion(const RmMigration *m, RmConversion *conv, const char *expr, MemoryContext cxt)
{
	if (conv == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the expression of migration %lld does not fit table %s any more",
						(long long) m->id, m->relation),
				 errdetail("A column that %s reads has been dropped or has another type now.", expr),
				 errhint("Give the migration up with CALL rm_rollback(%lld).",
						 (long long) m->id)));
	rm_conversion_prepare(conv, cxt);
	return conv;
}

/*
 * The conversion of one of the migration's columns, from old to new, ready for use
 * until the end of the transaction.
 */
RmConversion *
rm_column_conversion(const RmMigration *m, const RmConversionDef *column, Relation rel,
					 MemoryContext cxt)
{
	return prepare_conversion(m, rm_conversion_load(column->tree, m->server_version,
													column->using_expr, m->relid, rel,
													column->type, column->typmod,
													InvalidAttrNumber, m->settings, cxt),
							  column->using_expr, cxt);
}

/* that of the only one: from old to new, or after the swap from new to old */
RmConversion *
rm_migration_conversion(const RmMigration *m, Relation rel, MemoryContext cxt)
{
	RmConversion *conv = NULL;

	if (!m->swapped)
		conv = rm_conversion_load(m->tree, m->server_version, m->using_expr,
								  m->relid, rel,
								  m->new_type_id, m->new_typmod, m->new_attnum,
								  m->settings, cxt);
	else if (m->reverse_tree)
		conv = rm_conversion_load(m->reverse_tree, m->server_version,
								  m->reverse_expr, m->relid, rel, m->old_type_id,
								  TupleDescAttr(RelationGetDescr(rel), m->attnum - 1)->atttypmod,
								  m->attnum, m->settings, cxt);
	return prepare_conversion(m, conv, m->swapped && m->reverse_expr ? m->reverse_expr :
							  m->using_expr, cxt);
}

/*
 * Records a value that does not convert, in the transaction that met it.  Only
 * an INSERT, which no concurrent record of the same row can make fail; the
 * view rm_conversion_errors shows the last one of each row.  Needs SPI.
 */
void
rm_record_failure(RmMigration *m, const char *row_key, ItemPointer tid,
				  const char *value, ErrorData *error)
{
	Oid			types[] = {INT8OID, TEXTOID, TIDOID, TEXTOID, TEXTOID, TEXTOID, BOOLOID};
	Datum		v[7];
	char		n[7];

	memset(n, ' ', sizeof(n));
	v[0] = Int64GetDatum(m->id);
	v[1] = text_or_null(row_key, &n[1]);
	v[2] = PointerGetDatum(tid);
	n[2] = tid && ItemPointerIsValid(tid) ? ' ' : 'n';
	v[3] = text_or_null(value, &n[3]);
	v[4] = CStringGetTextDatum(unpack_sql_state(error->sqlerrcode));
	v[5] = CStringGetTextDatum(error->message);
	v[6] = BoolGetDatum(m->swapped);
	rm_state_execute("INSERT INTO risky_migrations.conversion_error"
					 " (migration_id, row_key, row_tid, value, sqlstate, message, way_back)"
					 " VALUES ($1, $2, $3, $4, $5, $6, $7)",
					 7, types, v, n);
}

/* what has been recorded of rows that do not convert is of no use any more; needs SPI */
void
rm_forget_failures(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("DELETE FROM risky_migrations.conversion_error WHERE migration_id = $1",
					 1, types, v, NULL);
}
