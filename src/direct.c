/*-------------------------------------------------------------------------
 *
 * direct.c
 *	  The method direct: plain ALTER TABLE, with a bounded wait for its lock.
 *
 * One step, one transaction: take ACCESS EXCLUSIVE, on all that ALTER TABLE will
 * lock (or let everybody through and try again), run ALTER TABLE ... ALTER COLUMN ... TYPE ... USING, commit.
 * While it runs nobody reads or writes the table: that is what it is here to
 * show, and for small tables it is all that is needed.
 *
 * The way back is the same with the reverse expression, if one was given.  It
 * is exact only for rows whose old value the new one still tells.  Under the
 * lock, before anything is changed, the way forth counts the rows for which
 * that does not hold (exact_check, a boolean over the old column), and the
 * way back those that were written since and have no form in the old type
 * (reverse_check, over the new one); if either is not zero, it refuses.
 *
 * Easy to get wrong: ALTER TABLE says which value does not convert, but not in
 * which row.  The row is looked for afterwards, without the lock: one that fails with
 * that very message, for others may fail in other columns.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "leaves.h"
#include "miscadmin.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

static int64
count_rows(const char *rel_sql, const char *condition)
{
	rm_execute(psprintf("SELECT pg_catalog.count(*) FROM ONLY %s WHERE %s", rel_sql,
						condition));
	return rm_result_int64(0, 1);
}

/*
 * The tables that ALTER TABLE locks: the table, its partitions and children, and
 * what is at the other end of the columns' foreign keys, which are dropped and
 * made again.  Needs SPI.
 */
static List *
tables_of_alter(const RmMigration *m)
{
	Oid			types[] = {OIDOID, INT2ARRAYOID};
	Datum		v[] = {ObjectIdGetDatum(m->relid), rm_attnum_array(rm_attnums_of(m->columns, m->relid))};
	List	   *relids = rm_tree(m->relid);
	List	   *peers = NIL;
	ListCell   *lc;

	rm_catalog_query("SELECT DISTINCT CASE k.conrelid WHEN m.member THEN k.confrelid ELSE k.conrelid END"
					 " FROM risky_migrations.member_columns($1, $2) m JOIN pg_catalog.pg_constraint k"
					 " ON k.contype OPERATOR(pg_catalog.=) 'f'"
					 " AND (k.conrelid OPERATOR(pg_catalog.=) m.member"
					 " AND m.number OPERATOR(pg_catalog.=) ANY (k.conkey)"
					 " OR k.confrelid OPERATOR(pg_catalog.=) m.member"
					 " AND m.number OPERATOR(pg_catalog.=) ANY (k.confkey)) ORDER BY 1",
					 2, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
		peers = lappend_oid(peers, DatumGetObjectId(rm_result_datum(i, 1)));
	foreach(lc, peers)
		relids = list_concat_unique_oid(relids, rm_tree(lfirst_oid(lc)));
	return relids;
}

/*
 * Locks them as a set: ALTER TABLE would hold the one while it waits for the
 * other.
 */
static void
lock_tables(RmRun *run)
{
	List	   *relids = tables_of_alter(run->m);

	rm_lock_relations(&run->locks, relids, AccessExclusiveLock, run->tries);
	if (list_difference_oid(tables_of_alter(run->m), relids) != NIL)
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("%s has just got another partition or foreign key",
						run->m->relation)));
}

/* locks the table and makes sure that it is still the one that was meant */
static const char *
begin_alter(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;

	lock_tables(run);
	rel = table_open(m->relid, NoLock);
	rm_check_ground(m, rel);
	rm_check_owner(m->relid, m->relation);
	table_close(rel, NoLock);
	run->old_storage = rm_relation_storage(m->relid);
	rm_settings_apply(m->settings, GUC_ACTION_LOCAL);
	return rm_relation_sql(m->relid);
}

/*
 * Runs an ALTER TABLE as the table's owner: it evaluates an expression that was
 * given by whoever may act as the owner, and a superuser may be running it.
 */
static void
execute_as_owner(Oid relid, const char *sql)
{
	Relation	rel = table_open(relid, NoLock);
	Oid			owner = rel->rd_rel->relowner;
	Oid			save_userid;
	int			save_sec_context;

	table_close(rel, NoLock);
	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(owner, save_sec_context | SECURITY_LOCAL_USERID_CHANGE);
	rm_execute(sql);
	SetUserIdAndSecContext(save_userid, save_sec_context);
}

static RmStepResult
alter_type_apply(RmRun *run)
{
	RmMigration *m = run->m;
	const char *rel_sql = begin_alter(run);

	if (m->exact_check)
		m->inexact_rows = count_rows(rel_sql, psprintf("NOT coalesce((%s), true)",
													   m->exact_check));
	execute_as_owner(m->relid, psprintf("ALTER TABLE %s %s", rel_sql,
										rm_alter_clauses(m->columns, m->relid, false)));
	return RM_STEP_DONE;
}

/*
 * Refuses (22000) if there are rows of which the way back would make another
 * value than there was.  Needs SPI; exact only under a lock.
 */
void
rm_direct_refuse_inexact(const RmMigration *m)
{
	const char *rel_sql = rm_relation_sql(m->relid);
	const char *column = quote_identifier(get_attname(m->relid, m->attnum, false));
	int64		inexact = m->inexact_rows;

	if (inexact == 0 && m->reverse_check)
		inexact = count_rows(rel_sql,
							 psprintf("%s IS NOT NULL AND NOT coalesce((%s), false)",
									  column, m->reverse_check));
	if (inexact > 0)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_EXCEPTION),
				 errmsg_plural("%lld row of %s cannot be given its old value back",
							   "%lld rows of %s cannot be given their old values back",
							   (unsigned long) inexact, (long long) inexact,
							   m->relation),
				 errdetail("%s. Nothing was changed.", m->inexact_rows > 0 ?
						   "When the type was changed, their values were in a form that the way back does not make" :
						   "Their present values have no form in the old type"),
				 errhint("Keep the new type, or change it with an ALTER TABLE of your own.")));
}

static RmStepResult
alter_type_revert(RmRun *run)
{
	RmMigration *m = run->m;
	const char *rel_sql;
	const char *column;
	StringInfoData sql;

	if (m->reverse_expr == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("migration %lld was given no way back", (long long) m->id),
				 errdetail("Nothing tells how the old value is made from the new one."),
				 errhint("Start a migration with the inverse expression.")));
	rel_sql = begin_alter(run);
	column = quote_identifier(get_attname(m->relid, m->attnum, false));
	rm_direct_refuse_inexact(m);
	initStringInfo(&sql);
	appendStringInfo(&sql, "ALTER TABLE %s ALTER COLUMN %s TYPE %s", rel_sql, column,
					 m->old_type);
	if (m->old_collation)
		appendStringInfo(&sql, " COLLATE %s", m->old_collation);
	appendStringInfo(&sql, " USING %s", m->reverse_expr);
	execute_as_owner(m->relid, sql.data);
	if (m->old_storage)
		rm_execute(psprintf("ALTER TABLE %s ALTER COLUMN %s SET STORAGE %s", rel_sql,
							column, m->old_storage));
	if (m->old_compression)
		rm_execute(psprintf("ALTER TABLE %s ALTER COLUMN %s SET COMPRESSION %s", rel_sql,
							column, m->old_compression));
	m->inexact_rows = 0;
	return RM_STEP_DONE;
}

/* what find_row looks for and finds */
typedef struct FindRow
{
	RmRun	   *run;
	MemoryContext cxt;
	const char *message;		/* what ALTER TABLE said */
	char	   *detail;
} FindRow;

/* the first row in which that column does not convert, with that message */
static void
find_row_of_column(FindRow *find, const RmMigration *all, const RmConversionDef *column, Relation rel)
{
	RmMigration one = *all;
	RmMigration *m = &one;
	RmRows	   *rows;
	BlockNumber end = RelationGetNumberOfBlocks(rel);

	one.attnum = column->attnum;
	one.new_type_id = column->type;
	one.new_typmod = column->typmod;
	one.using_expr = column->using_expr;
	one.tree = column->tree;
	rows = rm_rows_open(m, rel, RM_ROWS_READ);

	for (BlockNumber block = 0; block < end && find->detail == NULL; block++)
	{
		OffsetNumber offsets[MaxHeapTuplesPerPage];
		Buffer		buf = ReadBuffer(rel, block);
		int			dead;
		int			n = rm_rows_on_page(rows, buf, false, offsets, &dead);

		CHECK_FOR_INTERRUPTS();
		for (int i = 0; i < n && find->detail == NULL; i++)
		{
			Datum		value;
			bool		isnull;
			ErrorData  *error;

			rm_row_get(rows, buf, offsets[i]);
			if (!rm_row_convert(rows, true, &value, &isnull, &error) &&
				strcmp(error->message, find->message) == 0)
				find->detail =
					MemoryContextStrdup(find->cxt,
										psprintf("Row %s of %s does not convert. Nothing was changed.",
												 rm_row_key(rel, rows->slot), m->relation));
		}
		ReleaseBuffer(buf);
	}
	rm_rows_close(rows);
}

/* the first row that does not convert, with no lock but ACCESS SHARE */
static void
find_row(void *arg)
{
	FindRow    *find = arg;
	RmMigration *m = rm_migration_load(find->run->migration_id, false, CurrentMemoryContext);
	Relation	rel = table_open(m->relid, AccessShareLock);
	ListCell   *lc;

	foreach(lc, m->columns)
		if (find->detail == NULL)
			find_row_of_column(find, m, lfirst(lc), rel);
	table_close(rel, AccessShareLock);
}

static void
alter_type_explain(RmRun *run, ErrorData *error)
{
	FindRow		find = {.run = run,.cxt = run->cxt,.message = error->message};

	if (run->revert || !rm_is_conversion_failure(error->sqlerrcode))
		return;
	if (ERRCODE_TO_CATEGORY(error->sqlerrcode) == ERRCODE_TO_CATEGORY(ERRCODE_DATA_EXCEPTION) &&
		rm_try(find_row, &find, run->cxt) == NULL && find.detail != NULL)
	{
		error->detail = find.detail;
		if (error->hint == NULL)
			error->hint = "Mend the row, or give a USING expression that converts it.";
		return;
	}
	if (error->detail == NULL)
		error->detail = "PostgreSQL refuses this ALTER TABLE. Nothing was changed.";
	if (error->hint == NULL)
		error->hint = "Deal with what the message names, then call it again.";
}

/* when it began, when it ended: all that time nobody read or wrote the table */
static void
alter_type_committed(RmRun *run, RmStepResult result)
{
	TimestampTz now = GetCurrentTimestamp();
	double		ms = rm_elapsed_ms(run->started);
	char	   *began = pstrdup(timestamptz_to_str(now - (int64) (ms * 1000)));

	ereport(NOTICE,
			(errmsg("%s of %s: from %s to %s, %.3f s with the table locked",
					run->revert ? "changing back the type" : "changing the type",
					run->relation,
					began, timestamptz_to_str(now), ms / 1000.0)));
}

const RmStep rm_step_alter_type = {
	.name = "alter_type",
	.apply = alter_type_apply,
	.revert = alter_type_revert,
	.committed = alter_type_committed,
	.explain = alter_type_explain,
};

static const RmStep *const steps[] = {&rm_step_alter_type};

const RmMethod rm_method_direct = {
	.name = "direct",
	.steps = steps,
	.nsteps = lengthof(steps),
};
