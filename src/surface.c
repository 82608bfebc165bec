/*-------------------------------------------------------------------------
 *
 * surface.c
 *	  The procedures that carry out a migration step by step.
 *
 *	rm_add_column(relation, column_name, new_type, using_expr, reverse_expr)
 *	rm_backfill_batched(batch, migration)
 *	rm_enforce_not_null(migration)
 *	rm_swap(migration)
 *	rm_cleanup(migration)
 *	rm_rollback(migration)
 *
 * Each checks what it was given before anything is changed, finds out which
 * migration is meant, and hands its step to the runner.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/table.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "dependents.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "leaves.h"
#include "migration.h"
#include "miscadmin.h"
#include "rewrite.h"
#include "risky_migrations.h"
#include "state.h"
#include "steer.h"
#include "steps.h"
#include "surface.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/varlena.h"

PG_FUNCTION_INFO_V1(rm_add_column);
PG_FUNCTION_INFO_V1(rm_backfill_batched);
PG_FUNCTION_INFO_V1(rm_enforce_not_null);
PG_FUNCTION_INFO_V1(rm_swap);
PG_FUNCTION_INFO_V1(rm_cleanup);
PG_FUNCTION_INFO_V1(rm_rollback);

/* 1234567 -> "1,234,567" */
void
rm_format_count(char *buf, Size size, int64 n)
{
	char		digits[32];
	int			len = snprintf(digits, sizeof(digits), "%lld", (long long) n);
	Size		out = 0;

	for (int i = 0; i < len && out + 1 < size; i++)
	{
		if (i > 0 && (len - i) % 3 == 0 && digits[i - 1] != '-' && out + 2 < size)
			buf[out++] = ',';
		buf[out++] = digits[i];
	}
	buf[out] = '\0';
}

/* a count that was given as argument: not NULL, from min to max (22023, 22004) */
int64
rm_count_argument(FunctionCallInfo fcinfo, int arg, const char *name, int64 min,
				  int64 max)
{
	int64		n;

	if (PG_ARGISNULL(arg))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be NULL", name),
				 errdetail("It must be from %lld to %lld.", (long long) min, (long long) max),
				 errhint("Give a number, or leave it out for the default.")));
	n = PG_GETARG_INT64(arg);
	if (n < min || n > max)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s is out of range: %lld", name, (long long) n),
				 errdetail("It must be from %lld to %lld.", (long long) min, (long long) max),
				 errhint("Give a number in that range, or leave it out for the default.")));
	return n;
}

/* a text argument that must be there; palloc'd */
char *
rm_text_argument(FunctionCallInfo fcinfo, int arg, const char *name)
{
	if (PG_ARGISNULL(arg) || VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(arg)) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be NULL or empty", name),
				 errdetail("The call does not say which %s is meant.", name),
				 errhint("Give the %s.", name)));
	return text_to_cstring(PG_GETARG_TEXT_PP(arg));
}

/* OID of the table of that name, as it stands in the present search_path */
Oid
rm_find_relation(const char *name)
{
	MemoryContext cxt = CurrentMemoryContext;
	volatile Oid relid = InvalidOid;

	PG_TRY();
	{
		List	   *names = rm_qualified_name_list(name);

		relid = RangeVarGetRelid(makeRangeVarFromNameList(names), NoLock, true);
	}
	PG_CATCH();
	{
		rm_rethrow_explained(cxt, name, psprintf("The relation was given as \"%s\".", name),
							 "Give the table's name as in ALTER TABLE, with its schema if need be.");
	}
	PG_END_TRY();
	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation \"%s\" does not exist", name),
				 errdetail("It is not found with the present search_path."),
				 errhint("Give the table's name as in ALTER TABLE, with its schema if need be.")));
	return relid;
}

/*-------------------------------------------------------------------------
 * Which migration is meant
 *-------------------------------------------------------------------------
 */

typedef struct Resolve
{
	int64		id;				/* 0: the only open one */
	const char *method;			/* ... of that method; NULL: of any */
	MemoryContext cxt;
	RmMigration *m;
} Resolve;

/* the migration of that id, if it is the caller's to touch (42501); needs SPI */
RmMigration *
rm_migration_resolve(int64 id, MemoryContext cxt)
{
	RmMigration *m = rm_migration_load(id, false, cxt);

	if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(m->relid)))
		rm_check_owner(m->relid, m->relation);
	else if (!has_privs_of_role(GetUserId(), m->owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("migration %lld belongs to another role", (long long) id),
				 errhint("Only a member of the role that started it may touch it.")));
	return m;
}

static void
resolve(void *arg)
{
	Resolve    *r = arg;

	if (r->id == 0)
		r->id = rm_open_migration(r->method);
	r->m = rm_migration_resolve(r->id, r->cxt);
}

/* the migration of that id, loaded into the current memory context */
RmMigration *
rm_migration_read(int64 id)
{
	Resolve		r = {.id = id,.cxt = CurrentMemoryContext};

	rm_transaction(resolve, &r);
	return r.m;
}

/* NULL means the only open one of that method, or, without one, of any */
static RmMigration *
migration_argument(FunctionCallInfo fcinfo, int arg, const RmMethod *method)
{
	Resolve		r = {.method = method ? method->name : NULL,.cxt = CurrentMemoryContext};

	if (!PG_ARGISNULL(arg))
		r.id = rm_count_argument(fcinfo, arg, "migration", 1, PG_INT64_MAX);
	rm_transaction(resolve, &r);
	return r.m;
}

static void
refuse_wrong_state(RmMigration *m, const char *what, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("migration %lld is not at a point where %s is possible",
					(long long) m->id, what),
			 errdetail("It is %s, %d of %d steps of the method %s are done.", m->state,
					   m->steps_done, m->method->nsteps, m->method->name),
			 errhint("%s", hint)));
}

/*-------------------------------------------------------------------------
 * add_column
 *-------------------------------------------------------------------------
 */

/* what is needed to start a migration */
typedef struct Start
{
	const RmMigrationSpec *spec;
	MemoryContext cxt;
	RmMigration *m;
} Start;

/* what a session that was killed has left as running in the step log */
static void
log_interruption(int64 id)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(id)};

	rm_state_execute("UPDATE risky_migrations.step_log SET state = 'interrupted'"
					 " WHERE migration_id = $1 AND state = 'running'",
					 1, types, v, NULL);
}

/*
 * A migration of the same column (of either, where it has made another) that is still
 * open: refused if it has done anything, else (its first step failed or was killed)
 * given up.  attnum 0: one of no column.
 */
static void
refuse_open_migration(Oid relid, AttrNumber attnum)
{
	Oid			types[] = {OIDOID, INT8OID};
	Datum		v[] = {ObjectIdGetDatum(relid), Int64GetDatum(attnum)};
	int64		id;
	int64		steps;
	bool		begun;
	int			pid = 0;

	rm_state_execute("SELECT id, steps_done::int8, (phase <> 0)::int::int8 FROM risky_migrations.migration m"
					 " WHERE state = 'open' AND relid = $1 AND (attnum = $2 OR ($2 <> 0 AND new_attnum = $2)"
					 " OR EXISTS (SELECT FROM risky_migrations.further_column f"
					 " WHERE f.migration_id = m.id AND f.attnum = $2)) ORDER BY id",
					 2, types, v, NULL);
	if (SPI_processed == 0)
		return;
	id = rm_result_int64(0, 1);
	steps = rm_result_int64(0, 2);
	begun = steps > 0 || rm_result_int64(0, 3) != 0;
	if (!begun)
		pid = rm_runner_pid(RM_RUNNER_MIGRATION, id);
	if (begun || pid != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 attnum != 0 ? errmsg("migration %lld of this column is open", (long long) id) :
				 errmsg("migration %lld of this table is open", (long long) id),
				 errdetail(pid ? "Process %d runs it." : "%d of its steps are done.",
						   pid ? pid : (int) steps),
				 errhint("Go on with it, or give it up with CALL rm_rollback(%lld).",
						 (long long) id)));
	v[0] = Int64GetDatum(id);
	types[0] = INT8OID;
	rm_state_execute("UPDATE risky_migrations.migration SET state = 'rolled back' WHERE id = $1",
					 1, types, v, NULL);
	log_interruption(id);
}

/* on_error => 'null' for a column that may not be NULL, or by plain ALTER TABLE */
static void
refuse_null_on_error(Relation rel, const RmMigrationSpec *spec)
{
	ListCell   *lc;

	if (spec->method == &rm_method_direct)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("on_error => 'null' is not possible with the method %s",
						spec->method->name),
				 errdetail("Plain ALTER TABLE fails on the first value that does not convert."),
				 errhint("Use the method three_step, or a USING expression that gives NULL for such values.")));
	foreach(lc, rm_tree(RelationGetRelid(rel)))
		if (rm_is_not_null(lfirst_oid(lc), get_attnum(lfirst_oid(lc), spec->column)))
			break;
	if (lc)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("on_error => 'null' is not possible: column \"%s\" of \"%s\" is NOT NULL",
						spec->column, get_rel_name(lfirst_oid(lc))),
				 errdetail("What does not convert would become NULL, and then NOT NULL could not be enforced."),
				 errhint("Use on_error => 'stop' and mend what rm_check_conversion() lists, or drop the column's NOT NULL first.")));
}

/*
 * The method by which it is to be done, with what that decides of the rest.
 * Refuses (0A000) what the method is not able to do whatever the table.
 */
void
rm_spec_use_method(RmMigrationSpec *spec, const RmMethod *method)
{
	spec->method = method;
	spec->new_column = NULL;
	if (spec->column == NULL && method != &rm_method_online_rewrite)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the method %s needs a column that changes", method->name),
				 errdetail("Without one there is nothing to do but to write the table anew."),
				 errhint("Use the method online_rewrite.")));
	if (spec->further && method == &rm_method_three_step)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the method %s changes one column at a time", method->name),
				 errdetail("%d columns are to be changed.", list_length(spec->further) + 1),
				 errhint("Call rm_alter_type() for each, or use the method online_rewrite.")));
	if (method == &rm_method_three_step)
		spec->new_column = rm_shadow_column_name(spec->column);
	else if (spec->manual_cut_over && method == &rm_method_direct)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cut_over => 'manual' is not possible with the method %s",
						method->name),
				 errdetail("It changes the table in one transaction."),
				 errhint("Use the method three_step, or leave cut_over out.")));
	if (spec->reverse_expr && method == &rm_method_online_rewrite)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("reverse_expr is not possible with the method %s", method->name),
				 errdetail("It keeps no old column: after the cut-over the way back is a migration of its own."),
				 errhint("Use the method three_step, or leave reverse_expr out.")));
}

/*
 * A table that is being rewritten must keep its columns, and one whose columns
 * come and go cannot be rewritten (55006).  Needs SPI.
 */
static void
refuse_beside_rewrite(const RmMigrationSpec *spec)
{
	Oid			types[] = {OIDOID, BOOLOID};
	Datum		v[] = {ObjectIdGetDatum(spec->relid),
	BoolGetDatum(spec->method == &rm_method_online_rewrite)};

	rm_state_execute("SELECT id FROM risky_migrations.migration WHERE state = 'open'"
					 /* also where a table inherits from both */
					 " AND EXISTS (SELECT risky_migrations.members($1)"
					 " INTERSECT SELECT risky_migrations.members(relid))"
					 " AND (steps_done > 0 OR phase <> 0) AND ($2 OR method = 'online_rewrite')"
					 " ORDER BY id LIMIT 1", 2, types, v, NULL);
	if (SPI_processed > 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("migration %lld of the same table is open",
						(long long) rm_result_int64(0, 1)),
				 errdetail("online_rewrite needs the table, and what inherits from it, for itself."),
				 errhint("Take that one to its end first, or give it up with CALL rm_rollback(%lld).",
						 (long long) rm_result_int64(0, 1))));
}

/* 42701 if two of them are the same */
static void
refuse_column_twice(List *columns)
{
	for (int i = 1; i < list_length(columns); i++)
		for (int j = 0; j < i; j++)
		{
			const RmConversionDef *c = list_nth(columns, i);

			if (c->attnum == ((RmConversionDef *) list_nth(columns, j))->attnum)
				ereport(ERROR,
						(errcode(ERRCODE_DUPLICATE_COLUMN),
						 errmsg("column \"%s\" is named more than once", c->column),
						 errdetail("A column gets one type."),
						 errhint("Name it once.")));
		}
}

/*
 * Opens with ACCESS SHARE what was found by its name without a lock; 42P01 if it has
 * been dropped since, maybe by whoever that lock was waited for.
 */
Relation
rm_open_found(Oid relid)
{
	Relation	rel = try_relation_open(relid, AccessShareLock);

	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("the table does not exist any more"),
				 errdetail("It had the OID %u, and was dropped just now.", relid),
				 errhint("If there is another one of that name, call it again.")));
	return rel;
}

/*
 * Opens the table, with ACCESS SHARE to be kept, and parses what is to be done
 * with it (a list of RmConversionDef): refuses what no method can do.  The method
 * need not be known yet.
 */
Relation
rm_migration_open(const RmMigrationSpec *spec, List **columns)
{
	Relation	rel = rm_open_found(spec->relid);
	ListCell   *lc;

	rm_check_owner(spec->relid, RelationGetRelationName(rel));
	if (rel->rd_rel->relkind != RELKIND_RELATION &&
		rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" is not a table", RelationGetRelationName(rel)),
				 errdetail("Only the type of a table's column can be changed."),
				 errhint("Name the table.")));
	*columns = NIL;
	if (spec->column)
		*columns = list_make1(rm_conversion_parse(rel, spec->column, spec->new_type, spec->using_expr));
	foreach(lc, spec->further)
	{
		const RmColumnSpec *c = lfirst(lc);

		*columns = lappend(*columns, rm_conversion_parse(rel, c->column, c->new_type, c->using_expr));
	}
	refuse_column_twice(*columns);
	return rel;
}

/*
 * Parses and refuses all that the method cannot do: the migration as it would
 * begin, in cxt (but for its settings and columns), not written anywhere.  Needs SPI.
 */
RmMigration *
rm_migration_plan(const RmMigrationSpec *spec, MemoryContext cxt)
{
	List	   *columns;
	Relation	rel = rm_migration_open(spec, &columns);
	RmConversionDef *def = columns ? linitial(columns) : rm_conversion_none(rel);
	RmMigration *m;
	MemoryContext oldcxt;
	ListCell   *lc;

	if (columns == NIL)
		refuse_open_migration(spec->relid, InvalidAttrNumber);
	foreach(lc, columns)
		refuse_open_migration(spec->relid, ((RmConversionDef *) lfirst(lc))->attnum);
	if (spec->null_on_error)
		refuse_null_on_error(rel, spec);
	/* before all below the table is locked, to be looked at */
	if (spec->method != &rm_method_direct)
		rm_lock_check_room(spec->method->name, spec->relid, columns, 0);
	if (spec->new_column)
	{
		rm_three_step_refuse(rel, def, spec->new_column);
		rm_refuse_relatives(spec->relid);
		rm_refuse_entangled(spec->relid, def->attnum, def->tree);
		rm_dependents_refuse(spec->relid, def->attnum, def->type, !rm_accept_publications);
	}
	refuse_beside_rewrite(spec);
	if (spec->method == &rm_method_online_rewrite)
		rm_rewrite_refuse(rel, columns);

	oldcxt = MemoryContextSwitchTo(cxt);
	m = palloc0(sizeof(RmMigration));
	m->method = spec->method;
	m->owner = GetUserId();
	m->relid = spec->relid;
	m->relation = quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
											 RelationGetRelationName(rel));
	m->columns = columns;
	m->attnum = def->attnum;
	m->column = pstrdup(def->column);
	m->old_type = pstrdup(def->old_type_name);
	m->old_type_id = def->old_type;
	m->old_collation = def->old_collation ? pstrdup(def->old_collation) : NULL;
	m->old_storage = def->old_storage ? pstrdup(def->old_storage) : NULL;
	m->old_compression = def->old_compression ? pstrdup(def->old_compression) : NULL;
	m->new_type = pstrdup(def->type_name);
	m->new_type_id = def->type;
	m->new_typmod = def->typmod;
	if (spec->new_column)
	{
		m->new_column = pstrdup(spec->new_column);
		m->old_column = rm_old_column_name(spec->column);
	}
	m->using_expr = pstrdup(def->using_expr);
	m->reverse_expr = spec->reverse_expr ? pstrdup(spec->reverse_expr) : NULL;
	m->exact_check = spec->exact_check ? pstrdup(spec->exact_check) : NULL;
	m->reverse_check = spec->reverse_check ? pstrdup(spec->reverse_check) : NULL;
	m->null_on_error = spec->null_on_error;
	m->method_reason = spec->method_reason ? pstrdup(spec->method_reason) : NULL;
	m->settings = def->settings;
	m->tree = pstrdup(def->tree);
	m->server_version = def->server_version;
	MemoryContextSwitchTo(oldcxt);
	relation_close(rel, NoLock);
	return m;
}

/*
 * The same, and writes the state row: nothing of the user's is changed.  The
 * migration is made in cxt.  Needs SPI.
 */
RmMigration *
rm_migration_create(const RmMigrationSpec *spec, MemoryContext cxt)
{
	RmMigration *m = rm_migration_plan(spec, cxt);

	rm_migration_insert(m);
	if (spec->all_steps)
		rm_steer_order(m, spec);
	/* PostgreSQL itself says whether it could do it, on an empty copy */
	if (spec->new_column)
		(void) rm_dependents_derive(m, true, CurrentMemoryContext);
	else if (spec->method == &rm_method_online_rewrite)
		rm_rewrite_rehearse(m);
	/* these live in this transaction only */
	m->settings = m->columns = NIL;
	return m;
}

static void
create_migration(void *arg)
{
	Start	   *start = arg;

	start->m = rm_migration_create(start->spec, start->cxt);
}

/* the same in a transaction of its own */
RmMigration *
rm_migration_new(const RmMigrationSpec *spec)
{
	Start		start = {.spec = spec,.cxt = CurrentMemoryContext};

	rm_transaction(create_migration, &start);
	return start.m;
}

static void
give_up(void *arg)
{
	RmMigration *m = arg;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("UPDATE risky_migrations.migration SET state = 'rolled back'"
					 " WHERE id = $1 AND steps_done = 0",
					 1, types, v, NULL);
	if (SPI_processed > 0 && m->method->steps[0]->abandon)
		m->method->steps[0]->abandon(m);
}

/*
 * Runs the first step of a new migration.  If that fails, nothing has been
 * changed, and the migration is closed again.
 */
void
rm_migration_first_step(RmMigration *m, int batch)
{
	MemoryContext cxt = CurrentMemoryContext;

	PG_TRY();
	{
		rm_run_step(m, 0, false, batch);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(cxt);
		error = CopyErrorData();
		FlushErrorState();
		rm_transaction(give_up, m);
		ReThrowError(error);
	}
	PG_END_TRY();
}

/* starts a migration and runs its first step */
RmMigration *
rm_migration_start(const RmMigrationSpec *spec)
{
	RmMigration *m = rm_migration_new(spec);

	rm_migration_first_step(m, RM_DEFAULT_BATCH);
	return m;
}

/*
 * rm_add_column(relation text, column_name text, new_type text, using_expr text,
 *				 reverse_expr text)
 */
Datum
rm_add_column(PG_FUNCTION_ARGS)
{
	RmMigrationSpec spec = {.method = &rm_method_three_step};
	RmMigration *m;
	const char *relation;

	rm_procedure_begin(fcinfo, "rm_add_column");
	relation = rm_text_argument(fcinfo, 0, "relation");
	spec.column = rm_text_argument(fcinfo, 1, "column_name");
	spec.new_type = rm_text_argument(fcinfo, 2, "new_type");
	spec.using_expr = PG_ARGISNULL(3) ? NULL : rm_text_argument(fcinfo, 3, "using_expr");
	spec.reverse_expr = PG_ARGISNULL(4) ? NULL : rm_text_argument(fcinfo, 4, "reverse_expr");
	spec.relid = rm_find_relation(relation);
	spec.new_column = rm_shadow_column_name(spec.column);

	m = rm_migration_start(&spec);
	ereport(NOTICE,
			(errmsg("migration %lld: column \"%s\" %s added to %s, kept in step with \"%s\" by a trigger",
					(long long) m->id, m->new_column, m->new_type, m->relation,
					m->column),
			 errhint("Next: CALL rm_backfill_batched(%d).", RM_DEFAULT_BATCH)));
	rm_procedure_end();
	PG_RETURN_VOID();
}

/*-------------------------------------------------------------------------
 * The steps after it
 *-------------------------------------------------------------------------
 */

/*
 * rm_backfill_batched(batch bigint, migration bigint)
 */
Datum
rm_backfill_batched(PG_FUNCTION_ARGS)
{
	int			batch;
	RmMigration *m;

	rm_procedure_begin(fcinfo, "rm_backfill_batched");
	batch = (int) rm_count_argument(fcinfo, 0, "batch", 1, RM_MAX_BATCH);
	m = migration_argument(fcinfo, 1, &rm_method_three_step);
	if (strcmp(m->state, "open") != 0 || m->method != &rm_method_three_step ||
		m->steps_done < RM_BACKFILL)
		refuse_wrong_state(m, "a backfill",
						   "Start a migration with rm_add_column(), or in the lab with CALL rm_migrate('0003').");
	if (m->steps_done > RM_BACKFILL)
		ereport(NOTICE,
				(errmsg("migration %lld: the backfill is done already, nothing to do",
						(long long) m->id)));
	else
		rm_run_step(m, RM_BACKFILL, false, batch);
	rm_procedure_end();
	PG_RETURN_VOID();
}

/*
 * A migration whose sync trigger was switched off after the verification: what
 * was verified is not worth anything any more.
 */
static void
reopen_verification(void *arg)
{
	RmMigration *given = arg;
	RmMigration *m = given;

	if (m->steps_done > RM_ENFORCE_NOT_NULL && !m->swapped &&
		m->trigger_xmin != rm_trigger_xmin(m))
	{
		m = rm_migration_load(given->id, true, CurrentMemoryContext);
		given->steps_done = m->steps_done = RM_ENFORCE_NOT_NULL;
		m->phase = 0;
		rm_migration_save(m);
	}
}

/*
 * rm_enforce_not_null(migration bigint)
 */
Datum
rm_enforce_not_null(PG_FUNCTION_ARGS)
{
	RmMigration *m;

	rm_procedure_begin(fcinfo, "rm_enforce_not_null");
	m = migration_argument(fcinfo, 0, &rm_method_three_step);
	if (strcmp(m->state, "open") != 0 || m->method != &rm_method_three_step ||
		m->steps_done < RM_ENFORCE_NOT_NULL)
		refuse_wrong_state(m, "enforcing NOT NULL",
						   "Run the backfill first: CALL rm_backfill_batched(100000).");
	rm_transaction(reopen_verification, m);
	if (m->steps_done > RM_ENFORCE_NOT_NULL)
		ereport(NOTICE,
				(errmsg("migration %lld: NOT NULL is enforced already, nothing to do",
						(long long) m->id)));
	else
		rm_run_step(m, RM_ENFORCE_NOT_NULL, false, RM_DEFAULT_BATCH);
	rm_procedure_end();
	PG_RETURN_VOID();
}

static void
read_steps_done(void *arg)
{
	RmMigration *m = arg;

	m->steps_done = rm_migration_load(m->id, false, CurrentMemoryContext)->steps_done;
}

/*
 * rm_swap(migration bigint): builds what hangs on the column, if that has not
 * been done, and exchanges the columns
 */
Datum
rm_swap(PG_FUNCTION_ARGS)
{
	RmMigration *m;

	rm_procedure_begin(fcinfo, "rm_swap");
	m = migration_argument(fcinfo, 0, &rm_method_three_step);
	if (m->method != &rm_method_three_step || strcmp(m->state, "open") != 0 ||
		m->steps_done < RM_BUILD)
		refuse_wrong_state(m, "the swap",
						   "Make the new column complete first: SELECT next_call FROM rm_migrations.");
	if (m->steps_done > RM_SWAP)
		ereport(NOTICE,
				(errmsg("migration %lld: the columns have changed places already, nothing to do",
						(long long) m->id)));
	else
		while (m->steps_done <= RM_SWAP)
		{
			/* the next one, or an earlier one if a child has come */
			rm_run_step(m, m->steps_done, false, RM_DEFAULT_BATCH);
			rm_transaction(read_steps_done, m);
		}
	rm_procedure_end();
	PG_RETURN_VOID();
}

/*
 * rm_cleanup(migration bigint): drops the old column; there is no way back
 */
Datum
rm_cleanup(PG_FUNCTION_ARGS)
{
	RmMigration *m;

	rm_procedure_begin(fcinfo, "rm_cleanup");
	m = migration_argument(fcinfo, 0, &rm_method_three_step);
	if (m->method == &rm_method_three_step && strcmp(m->state, "done") == 0)
		ereport(NOTICE,
				(errmsg("migration %lld is done already, nothing to do",
						(long long) m->id)));
	else if (m->method != &rm_method_three_step || strcmp(m->state, "open") != 0 ||
			 m->steps_done < RM_CLEANUP)
		refuse_wrong_state(m, "the cleanup",
						   "The old column can be dropped after CALL rm_swap().");
	else
		rm_run_step(m, RM_CLEANUP, false, RM_DEFAULT_BATCH);
	rm_procedure_end();
	PG_RETURN_VOID();
}

/* closes a migration that has done nothing, or whose table is gone */
static void
close_migration(void *arg)
{
	RmMigration *m = rm_migration_load(((RmMigration *) arg)->id, true, CurrentMemoryContext);

	if ((m->steps_done > 0 || m->phase != 0) && SearchSysCacheExists1(RELOID, ObjectIdGetDatum(m->relid)))
		refuse_wrong_state(m, "the rollback",
						   "Another session has gone on with it meanwhile; call it again.");
	rm_rewrite_clear(m);
	rm_forget_rows(m);
	rm_leaves_forget(m);
	rm_dependents_save(m, true, NIL);
	rm_dependents_save(m, false, NIL);
	m->state = "rolled back";
	m->steps_done = 0;
	rm_migration_save(m);
	log_interruption(m->id);
}

/*
 * Takes back the steps from the present one down to the given number of
 * steps.  A migration whose table is gone is closed.
 */
void
rm_migration_revert(RmMigration *m, int to_steps)
{
	int			first = m->steps_done;

	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(m->relid)))
	{
		rm_transaction(close_migration, m);
		ereport(NOTICE,
				(errmsg("migration %lld: its table does not exist any more, it is closed",
						(long long) m->id)));
		return;
	}
	/* of a step that was begun there may be something too */
	if (first < m->method->nsteps && rm_step_begun(m))
		first++;
	for (int step = Min(first, m->method->nsteps) - 1; step >= to_steps; step--)
	{
		/* the column goes with all that is in it */
		if (m->method == &rm_method_three_step && step == RM_BACKFILL && to_steps < RM_BACKFILL)
			continue;
		rm_run_step(m, step, true, RM_DEFAULT_BATCH);
	}
	if (first == 0)
	{
		/* its first step may be under way */
		rm_become_runner(m);
		PG_TRY();
		{
			rm_transaction(close_migration, m);
		}
		PG_FINALLY();
		{
			rm_runner_unlock(RM_RUNNER_MIGRATION, m->id);
		}
		PG_END_TRY();
	}
}

/*
 * rm_rollback(migration bigint)
 */
Datum
rm_rollback(PG_FUNCTION_ARGS)
{
	RmMigration *m;

	rm_procedure_begin(fcinfo, "rm_rollback");
	m = migration_argument(fcinfo, 0, NULL);
	if (strcmp(m->state, "rolled back") == 0)
		ereport(NOTICE,
				(errmsg("migration %lld is rolled back already, nothing to do",
						(long long) m->id)));
	else
	{
		rm_migration_revert(m, 0);
		ereport(NOTICE,
				(errmsg("migration %lld is rolled back", (long long) m->id)));
	}
	rm_procedure_end();
	PG_RETURN_VOID();
}
