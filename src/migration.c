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

#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "compat.h"
#include "executor/spi.h"
#include "migration.h"
#include "miscadmin.h"
#include "parser/parse_type.h"
#include "risky_migrations.h"
#include "state.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"

/* the method of that name; the state table allows no other */
const RmMethod *
rm_method_by_name(const char *name)
{
	if (strcmp(name, rm_method_direct.name) == 0)
		return &rm_method_direct;
	if (strcmp(name, rm_method_three_step.name) == 0)
		return &rm_method_three_step;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("unknown method \"%s\"", name),
			 errhint("Methods are direct and three_step.")));
}

/*
 * Loads a migration into cxt and locks its row.  42704 if there is none.
 * Needs SPI.
 */
RmMigration *
rm_migration_load(int64 id, MemoryContext cxt)
{
	Oid			types[] = {INT8OID};
	Datum		values[] = {Int64GetDatum(id)};
	RmMigration *m;
	MemoryContext oldcxt;
	int			col = 0;

	rm_state_execute("SELECT method, state, steps_done::int8, phase::int8, owner::int8,"
					 " relid::int8, relation, attnum::int8, column_name, old_type,"
					 " new_type, new_attnum::int8, new_column, using_expr,"
					 " reverse_expr, exact_check, reverse_check, settings, conversion_tree,"
					 " server_version::int8, enforced::int::int8, relfilenode::int8,"
					 " next_block, end_block, rows_done, rows_estimated, inexact_rows"
					 " FROM risky_migrations.migration WHERE id = $1 FOR UPDATE",
					 1, types, values, NULL);
	if (SPI_processed == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("migration %lld does not exist", (long long) id),
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
	m->new_type = rm_result_text(0, ++col);
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
	m->relfilenode = rm_result_int64(0, ++col);
	m->next_block = rm_result_int64(0, ++col);
	m->end_block = rm_result_int64(0, ++col);
	m->rows_done = rm_result_int64(0, ++col);
	m->rows_estimated = rm_result_int64(0, ++col);
	m->inexact_rows = rm_result_int64(0, ++col);
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
	TEXTOID, INT8OID};
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

	rm_state_execute("INSERT INTO risky_migrations.migration (method, owner, relid,"
					 " relation, attnum, column_name, old_type, new_type,"
					 " new_column, using_expr, reverse_expr, exact_check,"
					 " reverse_check, settings, conversion_tree, server_version)"
					 " VALUES ($1, $2::oid, $3::oid, $4, $5, $6, $7, $8, $9, $10,"
					 " $11, $12, $13, $14, $15, $16) RETURNING id",
					 lengthof(types), types, v, n);
	m->id = rm_result_int64(0, 1);
	m->state = "open";
	return m->id;
}

/* writes what can change while it runs */
void
rm_migration_save(const RmMigration *m)
{
	Oid			types[] = {INT8OID, TEXTOID, INT8OID, INT8OID, INT8OID, BOOLOID,
	INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID};
	Datum		v[lengthof(types)];
	int			i = 0;

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
	rm_state_execute("UPDATE risky_migrations.migration SET state = $2,"
					 " steps_done = $3, phase = $4, new_attnum = $5, enforced = $6,"
					 " relfilenode = $7::oid, next_block = $8, end_block = $9,"
					 " rows_done = $10, rows_estimated = $11, inexact_rows = $12"
					 " WHERE id = $1",
					 lengthof(types), types, v, NULL);
}

/*
 * The only open migration of that method whose table still exists and is the
 * caller's own.  42704 if there is none, 42725 with the list if there are
 * several.
 */
int64
rm_open_migration(const char *method)
{
	Oid			types[] = {TEXTOID, OIDOID};
	Datum		values[] = {CStringGetTextDatum(method), ObjectIdGetDatum(GetUserId())};
	StringInfoData list;

	rm_state_execute("SELECT m.id, m.relation, m.column_name"
					 " FROM risky_migrations.migration m"
					 " JOIN pg_catalog.pg_class c ON c.oid = m.relid"
					 " WHERE m.state = 'open' AND m.method = $1"
					 " AND pg_catalog.pg_has_role($2, c.relowner, 'USAGE') ORDER BY m.id",
					 2, types, values, NULL);
	if (SPI_processed == 1)
		return rm_result_int64(0, 1);
	if (SPI_processed == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("there is no open migration"),
				 errdetail("None of the method %s is open on a table of yours.", method),
				 errhint("Start one with rm_add_column(), or in the lab with CALL rm_migrate('0003').")));
	initStringInfo(&list);
	for (uint64 i = 0; i < SPI_processed; i++)
		appendStringInfo(&list, "%s%lld (%s, column %s)", i ? ", " : "",
						 (long long) rm_result_int64(i, 1), rm_result_text(i, 2),
						 rm_result_text(i, 3));
	ereport(ERROR,
			(errcode(ERRCODE_AMBIGUOUS_PARAMETER),
			 errmsg("several migrations are open"),
			 errdetail("They are: %s.", list.data),
			 errhint("Give the id of the one that is meant.")));
}

/* 42501 unless the current role owns the table */
void
rm_check_owner(Oid relid, const char *relation)
{
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

/* stops cleanly if somebody's DDL has changed what the migration relies on */
void
rm_check_ground(const RmMigration *m, Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);
	Form_pg_attribute att;
	const char *broken = NULL;
	char	   *trigger_name = rm_trigger_name(m->id);
	Trigger    *sync = NULL;

	att = m->attnum <= desc->natts ? TupleDescAttr(desc, m->attnum - 1) : NULL;
	if (att == NULL || att->attisdropped)
		broken = psprintf("The column \"%s\" has been dropped.", m->column);
	else if (m->new_attnum != 0)
	{
		Oid			old_type,
					new_type;
		int32		typmod;

		parseTypeString(m->old_type, &old_type, &typmod, 0);
		if (old_type != att->atttypid)
			broken = psprintf("The column \"%s\" has another type now.",
							  NameStr(att->attname));
		parseTypeString(m->new_type, &new_type, &typmod, 0);
		att = m->new_attnum <= desc->natts ? TupleDescAttr(desc, m->new_attnum - 1) : NULL;
		if (att == NULL || att->attisdropped)
			broken = psprintf("The column \"%s\" has been dropped.", m->new_column);
		else if (new_type != att->atttypid || typmod != att->atttypmod)
			broken = psprintf("The column \"%s\" has another type now.",
							  NameStr(att->attname));
		for (int i = 0; rel->trigdesc && i < rel->trigdesc->numtriggers; i++)
			if (strcmp(rel->trigdesc->triggers[i].tgname, trigger_name) == 0)
				sync = &rel->trigdesc->triggers[i];
		if (broken == NULL && sync == NULL)
			broken = psprintf("The sync trigger \"%s\" has been dropped or disabled.",
							  trigger_name);
		else if (broken == NULL && sync->tgenabled != TRIGGER_FIRES_ALWAYS)
			broken = psprintf("The sync trigger \"%s\" is not enabled ALWAYS any more.",
							  trigger_name);
		for (int i = 0; broken == NULL && i < rel->trigdesc->numtriggers; i++)
		{
			Trigger    *t = &rel->trigdesc->triggers[i];

			if (TRIGGER_FOR_BEFORE(t->tgtype) && TRIGGER_FOR_ROW(t->tgtype) &&
				(TRIGGER_FOR_INSERT(t->tgtype) || TRIGGER_FOR_UPDATE(t->tgtype)) &&
				strcmp(t->tgname, trigger_name) > 0)
				broken = psprintf("The trigger \"%s\" fires after the sync trigger and could change the row again.",
								  t->tgname);
		}
	}
	if (broken)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table %s has been changed while migration %lld was open",
						m->relation, (long long) m->id),
				 errdetail("%s", broken),
				 errhint("Undo that change, or give the migration up with CALL rm_rollback(%lld).",
						 (long long) m->id)));
}

/* the migration's conversion, ready for use until the end of the transaction */
RmConversion *
rm_migration_conversion(const RmMigration *m, Relation rel, MemoryContext cxt)
{
	Oid			type;
	int32		typmod;
	RmConversion *conv;

	parseTypeString(m->new_type, &type, &typmod, 0);
	conv = rm_conversion_load(m->tree, m->server_version, m->using_expr, rel,
							  type, typmod, m->new_attnum, m->settings, cxt);
	if (conv == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the expression of migration %lld does not fit table %s any more",
						(long long) m->id, m->relation),
				 errdetail("A column that %s reads has been dropped or has another type now.",
						   m->using_expr),
				 errhint("Give the migration up with CALL rm_rollback(%lld).",
						 (long long) m->id)));
	rm_conversion_prepare(conv, cxt);
	return conv;
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
	Oid			types[] = {INT8OID, TEXTOID, TIDOID, TEXTOID, TEXTOID, TEXTOID};
	Datum		v[6];
	char		n[6];

	memset(n, ' ', sizeof(n));
	v[0] = Int64GetDatum(m->id);
	v[1] = text_or_null(row_key, &n[1]);
	v[2] = PointerGetDatum(tid);
	n[2] = tid && ItemPointerIsValid(tid) ? ' ' : 'n';
	v[3] = text_or_null(value, &n[3]);
	v[4] = CStringGetTextDatum(unpack_sql_state(error->sqlerrcode));
	v[5] = CStringGetTextDatum(error->message);
	rm_state_execute("INSERT INTO risky_migrations.conversion_error"
					 " (migration_id, row_key, row_tid, value, sqlstate, message)"
					 " VALUES ($1, $2, $3, $4, $5, $6)",
					 6, types, v, n);
}
