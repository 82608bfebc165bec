/*-------------------------------------------------------------------------
 *
 * lab.c
 *	  The lab: both ways to change a column's type, on tables of its own.
 *
 *	zero -> 0001 tables small_record and large_record
 *			  |-> 0002 the direct change of both
 *			  '-> 0003 column and trigger -> 0004 backfill -> 0005 NOT NULL
 *
 * rm_migrate() walks this tree from where the lab stands to where it is told
 * to go: back first, then forth.  Where it stands is not written down apart:
 * it is read from the migrations of its tables.  The lab is the first user of
 * the same machinery that serves any table; 0002 to 0005 are steps of the
 * methods direct and three_step.
 *
 * The truth about a row of the lab can be told from its name, so that every
 * value can be checked at any time: LargeRecord_17 and SmallRecord_17 hold
 * the 17th of the seeded moments, and whoever writes a row by rm_lab_write()
 * names it "written " and the string it wrote.
 *
 * Easy to get wrong: the tables are known by their OIDs.  A table of the same
 * name that the lab did not make is never touched.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/dependency.h"
#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "common/pg_prng.h"
#include "compat.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "migration.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "risky_migrations.h"
#include "state.h"
#include "steps.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "surface.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/guc.h"
#include "utils/json.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker.h"

PG_FUNCTION_INFO_V1(rm_migrate);
PG_FUNCTION_INFO_V1(rm_seed);
PG_FUNCTION_INFO_V1(rm_list_large);
PG_FUNCTION_INFO_V1(rm_compare);
PG_FUNCTION_INFO_V1(rm_lab_write);
PG_FUNCTION_INFO_V1(rm_lab_check);
PG_FUNCTION_INFO_V1(rm_lab_moment);
PG_FUNCTION_INFO_V1(rm_is_lab_form);

#define SMALL "small_record"
#define LARGE "large_record"
#define SMALL_ROWS 100
#define MAX_ROWS INT64CONST(1000000000)
#define DEFAULT_SEED_BATCH 10000
/* how long the probes run before and after what they are to see, in ms */
#define QUIET_MS 500

#define USING_EXPR "created_at::pg_catalog.timestamp"
#define LAB_FORM "'YYYY-MM-DD HH24:MI:SS'"
#define REVERSE_EXPR "pg_catalog.to_char(created_at, " LAB_FORM ")"
#define EXACT_CHECK RM_SCHEMA ".is_lab_form(created_at)"
#define REVERSE_CHECK REVERSE_EXPR "::pg_catalog.timestamp = created_at"

/* where the lab in one schema stands */
typedef struct Lab
{
	Oid			nspid;
	Oid			small_relid;	/* InvalidOid: there is no lab */
	Oid			large_relid;
	Oid			known_small;	/* what it once made, even if one is gone */
	Oid			known_large;
	MemoryContext cxt;
	bool		small_is_exact; /* see apply_direct */
	RmMigration *direct_small;	/* done, or NULL */
	RmMigration *direct_large;
	RmMigration *three_step;	/* open, or NULL */
	RmMigration *rewrite;		/* of a comparison: open or done, or NULL */
} Lab;

static const char *const targets[] = {"zero", "0001", "0002", "0003", "0004", "0005"};

/*-------------------------------------------------------------------------
 * Where it stands
 *-------------------------------------------------------------------------
 */

/* the schema that tables are created in (3F000 if there is none) */
static Oid
current_schema_oid(void)
{
	List	   *path;
	Oid			nspid;

	/* if pg_temp comes first, its schema may have to be made now */
	PushActiveSnapshot(GetTransactionSnapshot());
	path = fetch_search_path(false);
	PopActiveSnapshot();
	nspid = path == NIL ? InvalidOid : linitial_oid(path);
	if (OidIsValid(nspid) && isAnyTempNamespace(nspid))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the lab cannot be in a temporary schema"),
				 errdetail("Nobody else could be waiting for its tables."),
				 errhint("SET search_path to an ordinary schema.")));

	if (!OidIsValid(nspid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_SCHEMA),
				 errmsg("no schema has been selected for the lab"),
				 errdetail("No schema of search_path exists."),
				 errhint("SET search_path to the schema that the lab's tables are to be in.")));
	return nspid;
}

static const char *
lab_sql(Oid nspid, const char *table)
{
	return quote_qualified_identifier(get_namespace_name(nspid), table);
}

/* fills in the OIDs of the lab's tables; a lab that lost one is none */
static void
find_tables(Lab *lab)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(lab->nspid)};

	lab->small_relid = lab->large_relid = InvalidOid;
	lab->known_small = lab->known_large = InvalidOid;
	rm_state_execute("SELECT small_relid::int8, large_relid::int8"
					 " FROM risky_migrations.lab WHERE nspid = $1", 1, types, v, NULL);
	if (SPI_processed == 0)
		return;
	lab->small_relid = lab->known_small = rm_result_int64(0, 1);
	lab->large_relid = lab->known_large = rm_result_int64(0, 2);
	if (get_relname_relid(SMALL, lab->nspid) != lab->small_relid ||
		get_relname_relid(LARGE, lab->nspid) != lab->large_relid)
		lab->small_relid = lab->large_relid = InvalidOid;
}

/* the migration in that state of a table, or NULL */
static RmMigration *
find_migration(Lab *lab, Oid relid, const char *method, const char *state)
{
	Oid			types[] = {OIDOID, TEXTOID, TEXTOID};
	Datum		v[] = {ObjectIdGetDatum(relid), CStringGetTextDatum(method),
	CStringGetTextDatum(state)};

	rm_state_execute("SELECT id FROM risky_migrations.migration WHERE relid = $1"
					 " AND method = $2 AND state = $3 ORDER BY id DESC LIMIT 1",
					 3, types, v, NULL);
	if (SPI_processed == 0)
		return NULL;
	return rm_migration_load(rm_result_int64(0, 1), false, lab->cxt);
}

static void
look(void *arg)
{
	Lab		   *lab = arg;

	find_tables(lab);
	lab->direct_small = lab->direct_large = lab->three_step = lab->rewrite = NULL;
	if (!OidIsValid(lab->large_relid))
		return;
	rm_check_owner(lab->small_relid, SMALL);
	rm_check_owner(lab->large_relid, LARGE);
	lab->direct_small = find_migration(lab, lab->small_relid, "direct", "done");
	lab->direct_large = find_migration(lab, lab->large_relid, "direct", "done");
	lab->three_step = find_migration(lab, lab->large_relid, "three_step", "open");
	lab->rewrite = find_migration(lab, lab->large_relid, "online_rewrite", "open");
	if (lab->rewrite == NULL)
		lab->rewrite = find_migration(lab, lab->large_relid, "online_rewrite", "done");
}

/* is the rewrite begun, and not at its end? */
static bool
is_open(const RmMigration *m)
{
	return m && strcmp(m->state, "open") == 0;
}

/* number of steps of three_step that are done; 0 also if there is none */
static int
steps_done(const Lab *lab)
{
	return lab->three_step ? lab->three_step->steps_done : 0;
}

/* 42P01 unless the current schema has a lab; for functions, needs SPI */
static void
need_lab(Lab *lab)
{
	memset(lab, 0, sizeof(Lab));
	lab->nspid = current_schema_oid();
	lab->cxt = CurrentMemoryContext;
	find_tables(lab);
	if (!OidIsValid(lab->large_relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("there is no lab in schema \"%s\"",
						get_namespace_name(lab->nspid)),
				 errdetail("The lab's tables are made by its migration 0001."),
				 errhint("CALL rm_migrate('0001'), or set search_path to the schema of the lab.")));
}

/*-------------------------------------------------------------------------
 * 0001
 *-------------------------------------------------------------------------
 */

static void
refuse_existing_table(Lab *lab, const char *name, Oid own)
{
	Oid			relid = get_relname_relid(name, lab->nspid);

	if (OidIsValid(relid) && relid == own)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the lab in schema \"%s\" has lost one of its tables",
						get_namespace_name(lab->nspid)),
				 errdetail("Only %s is left of it.", lab_sql(lab->nspid, name)),
				 errhint("CALL rm_migrate('zero') drops what is left.")));
	if (OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_DUPLICATE_TABLE),
				 errmsg("relation %s already exists and is not the lab's own",
						lab_sql(lab->nspid, name)),
				 errdetail("The lab never touches a table that it did not make."),
				 errhint("SET search_path to another schema for the lab, or rename that table; drop it if an earlier installation of the extension made it.")));
}

static RmStepResult
create_tables_apply(RmRun *run)
{
	Lab		   *lab = run->work;
	Oid			types[] = {OIDOID, OIDOID, OIDOID, OIDOID};
	Datum		v[4];
	static const char *const tables[] = {SMALL, LARGE};

	/* a table of somebody else's is worth telling before one that is left */
	if (get_relname_relid(LARGE, lab->nspid) != lab->known_large)
		refuse_existing_table(lab, LARGE, lab->known_large);
	refuse_existing_table(lab, SMALL, lab->known_small);
	refuse_existing_table(lab, LARGE, lab->known_large);
	for (int i = 0; i < lengthof(tables); i++)
		rm_execute(psprintf("CREATE TABLE %s (id bigserial PRIMARY KEY,"
							" name varchar(100) NOT NULL,"
							" created_at varchar(50) NOT NULL)",
							lab_sql(lab->nspid, tables[i])));
	lab->small_relid = get_relname_relid(SMALL, lab->nspid);
	lab->large_relid = get_relname_relid(LARGE, lab->nspid);
	run->relid = lab->large_relid;
	run->relation = MemoryContextStrdup(run->cxt, lab_sql(lab->nspid, LARGE));

	v[0] = ObjectIdGetDatum(lab->nspid);
	v[1] = ObjectIdGetDatum(lab->small_relid);
	v[2] = ObjectIdGetDatum(lab->large_relid);
	v[3] = ObjectIdGetDatum(GetUserId());
	rm_state_execute("INSERT INTO risky_migrations.lab VALUES ($1, $2, $3, $4)"
					 " ON CONFLICT (nspid) DO UPDATE SET small_relid = $2,"
					 " large_relid = $3, owner = $4, created_at = DEFAULT",
					 4, types, v, NULL);
	return RM_STEP_DONE;
}

/* is the table that the lab made still there under its name? */
static bool
is_own(Lab *lab, const char *name, Oid known)
{
	return OidIsValid(known) && get_relname_relid(name, lab->nspid) == known;
}

/* drops what is there of the lab, also if one of its tables is lost */
static RmStepResult
create_tables_revert(RmRun *run)
{
	Lab		   *lab = run->work;
	bool		large = is_own(lab, LARGE, lab->known_large);
	bool		small = is_own(lab, SMALL, lab->known_small);
	Oid			types[2] = {OIDOID, OIDOID};
	Datum		v[2] = {ObjectIdGetDatum(lab->nspid)};

	run->relid = lab->known_large;
	run->relation = MemoryContextStrdup(run->cxt, lab_sql(lab->nspid, LARGE));
	if (large)
		rm_lock_relation(&run->locks, lab->known_large, AccessExclusiveLock);
	/* while the first is held the second is not waited for */
	if (small && !ConditionalLockRelationOid(lab->known_small, AccessExclusiveLock))
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("could not lock %s at once", lab_sql(lab->nspid, SMALL)),
				 errdetail("While the other table is locked, this one is not waited for."),
				 errhint("Call it again when nobody uses the table.")));
	if (large)
		rm_execute(psprintf("DROP TABLE %s", lab_sql(lab->nspid, LARGE)));
	if (small)
		rm_execute(psprintf("DROP TABLE %s", lab_sql(lab->nspid, SMALL)));
	rm_state_execute("DELETE FROM risky_migrations.lab WHERE nspid = $1", 1, types, v,
					 NULL);
	v[0] = ObjectIdGetDatum(lab->known_large);
	v[1] = ObjectIdGetDatum(lab->known_small);
	rm_state_execute("UPDATE risky_migrations.migration SET state = 'rolled back',"
					 " steps_done = 0 WHERE relid IN ($1, $2)", 2, types, v, NULL);
	lab->small_relid = lab->large_relid = InvalidOid;
	lab->known_small = lab->known_large = InvalidOid;
	return RM_STEP_DONE;
}

static const RmStep create_tables = {
	.name = "create_tables",
	.apply = create_tables_apply,
	.revert = create_tables_revert,
};

/*-------------------------------------------------------------------------
 * 0002 to 0005
 *-------------------------------------------------------------------------
 */

/* the change that the lab is about, by whatever method */
static RmMigrationSpec
change_by(const RmMethod *method, Oid relid)
{
	RmMigrationSpec spec = {
		.method = method,
		.relid = relid,
		.column = "created_at",
		.new_type = "timestamp",
		.using_expr = USING_EXPR,
	};

	return spec;
}

static void
start_direct(Lab *lab, Oid relid)
{
	RmMigrationSpec spec = change_by(&rm_method_direct, relid);

	spec.reverse_expr = REVERSE_EXPR;
	spec.exact_check = EXACT_CHECK;
	spec.reverse_check = REVERSE_CHECK;
	(void) rm_migration_start(&spec);
}

/* 22xxx, before anything is changed, if a row of small_record does not convert */
static void
check_small(void *arg)
{
	Lab		   *lab = arg;
	ErrorData  *error;
	char	   *key = rm_first_failure(lab->small_relid, "created_at", "timestamp",
									   USING_EXPR, &error);

	if (key)
		ereport(ERROR,
				(errcode(error->sqlerrcode),
				 errmsg("%s", error->message),
				 errdetail("Row %s of %s does not convert. Nothing was changed.", key,
						   lab_sql(lab->nspid, SMALL)),
				 errhint("Mend the row, then call it again.")));
}

/* could small_record be changed back exactly? */
static void
check_small_exact(void *arg)
{
	Lab		   *lab = arg;

	rm_execute(psprintf("SELECT 1 FROM %s WHERE NOT coalesce((%s), true) LIMIT 1",
						lab_sql(lab->nspid, SMALL), EXACT_CHECK));
	lab->small_is_exact = SPI_processed == 0;
}

/* large_record; if that fails, small_record is changed back */
static void
start_direct_large(Lab *lab)
{
	MemoryContext cxt = CurrentMemoryContext;

	PG_TRY();
	{
		start_direct(lab, lab->large_relid);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(cxt);
		error = CopyErrorData();
		FlushErrorState();
		rm_transaction(look, lab);
		if (lab->direct_small && lab->direct_small->inexact_rows == 0)
			rm_migration_revert(lab->direct_small, 0);
		ReThrowError(error);
	}
	PG_END_TRY();
}

/*
 * Both tables, or none.  The small one is changed back if the large one fails;
 * where that would not be exact, it comes last.
 */
static void
apply_direct(Lab *lab)
{
	if (lab->direct_small == NULL)
	{
		rm_transaction(check_small, lab);
		rm_transaction(check_small_exact, lab);
		if (lab->small_is_exact)
			start_direct(lab, lab->small_relid);
	}
	if (lab->direct_large == NULL)
		start_direct_large(lab);
	if (lab->direct_small == NULL && !lab->small_is_exact)
		start_direct(lab, lab->small_relid);
}

static void
check_small_reversible(void *arg)
{
	rm_direct_refuse_inexact(((Lab *) arg)->direct_small);
}

/* likewise: what stands against it in either table is found before */
static void
revert_direct(Lab *lab)
{
	if (lab->direct_small)
		rm_transaction(check_small_reversible, lab);
	if (lab->direct_large)
		rm_migration_revert(lab->direct_large, 0);
	if (lab->direct_small)
		rm_migration_revert(lab->direct_small, 0);
}

static void
start_three_step(Lab *lab)
{
	RmMigrationSpec spec = change_by(&rm_method_three_step, lab->large_relid);

	spec.new_column = rm_shadow_column_name(spec.column);
	(void) rm_migration_start(&spec);
}

/*
 * online_rewrite of the large table, from 0001.  It is none of the lab's
 * migrations: it ends with the lab's being dropped.
 */
static void
run_rewrite(Lab *lab)
{
	RmMigrationSpec spec = change_by(&rm_method_online_rewrite, lab->large_relid);

	(void) rm_migration_start(&spec);
	for (;;)
	{
		rm_transaction(look, lab);
		if (!is_open(lab->rewrite))
			break;
		rm_run_step(lab->rewrite, lab->rewrite->steps_done, false, RM_DEFAULT_BATCH);
	}
}

/* goes to the target, an index of targets; the caller holds the lab's lock */
static void
go_to(Lab *lab, int target)
{
	int			want_steps = target >= 3 ? target - 2 : 0;

	rm_transaction(look, lab);

	/* back; what is dropped anyway need not be changed back first */
	if (target == 0)
	{
		if (lab->three_step)
			rm_migration_revert(lab->three_step, 0);
		if (is_open(lab->rewrite))
			rm_migration_revert(lab->rewrite, 0);
		if (OidIsValid(lab->known_large))
			rm_run_free_step("lab", &create_tables, true, lab);
		return;
	}
	if (lab->rewrite)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("%s has been rewritten by rm_compare", lab_sql(lab->nspid, LARGE)),
				 errdetail("Migration %lld of the method online_rewrite is %s.",
						   (long long) lab->rewrite->id, lab->rewrite->state),
				 errhint("CALL rm_migrate('zero') first.")));
	if (target != 2 && (lab->direct_small || lab->direct_large))
		revert_direct(lab);
	if (steps_done(lab) > want_steps ||
		(lab->three_step && (want_steps == 0 ||
							 (steps_done(lab) == want_steps && rm_step_begun(lab->three_step)))))
		rm_migration_revert(lab->three_step, want_steps);

	/* forth */
	if (!OidIsValid(lab->large_relid))
		rm_run_free_step("lab", &create_tables, false, lab);
	if (target == 2)
		apply_direct(lab);
	if (want_steps > 0 && steps_done(lab) == 0)
	{
		start_three_step(lab);
		rm_transaction(look, lab);
	}
	for (int step = steps_done(lab); step < want_steps; step++)
		rm_run_step(lab->three_step, step, false, RM_DEFAULT_BATCH);
}

/* takes the lab's lock or says who has it (55006) */
static void
lock_lab(Oid nspid)
{
	int			pid;

	if (!rm_runner_lock(RM_RUNNER_LAB, nspid, &pid))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("the lab in schema \"%s\" is being migrated in another session",
						get_namespace_name(nspid)),
				 errdetail("Process %d does it.", pid),
				 errhint("Wait for it, or end it with pg_cancel_backend(%d).", pid)));
}

/* index of that name in targets (22023) */
static int
find_target(const char *name)
{
	for (int i = 0; i < lengthof(targets); i++)
		if (strcmp(name, targets[i]) == 0)
			return i;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("there is no migration \"%s\"", name),
			 errdetail("The lab has the migrations 0001 to 0005; \"zero\" takes them all back."),
			 errhint("SELECT * FROM rm_showmigrations() shows them.")));
}

/*
 * rm_migrate(target text)
 */
Datum
rm_migrate(PG_FUNCTION_ARGS)
{
	int			target;
	Lab			lab = {0};

	rm_procedure_begin(fcinfo, "rm_migrate");
	target = find_target(rm_text_argument(fcinfo, 0, "target"));
	lab.cxt = CurrentMemoryContext;
	lab.nspid = current_schema_oid();
	lock_lab(lab.nspid);
	PG_TRY();
	{
		go_to(&lab, target);
	}
	PG_FINALLY();
	{
		rm_runner_unlock(RM_RUNNER_LAB, lab.nspid);
	}
	PG_END_TRY();
	rm_procedure_end();
	PG_RETURN_VOID();
}

/*-------------------------------------------------------------------------
 * The rows
 *-------------------------------------------------------------------------
 */

/* is it YYYY-MM-DD HH:MM:SS, which the way back from a timestamp makes again? */
static bool
is_lab_form(const char *s, int len)
{
	static const char form[] = "dddd-dd-dd dd:dd:dd";

	if (len != (int) sizeof(form) - 1)
		return false;
	for (int i = 0; i < len; i++)
		if (form[i] == 'd' ? !(s[i] >= '0' && s[i] <= '9') : s[i] != form[i])
			return false;
	/* 24:00:00 and a 60th second would be read as the next day or minute */
	return memcmp(s + 11, "24", 2) < 0 && s[17] < '6' && s[14] < '6';
}

/*
 * risky_migrations.is_lab_form(text) returns boolean
 */
Datum
rm_is_lab_form(PG_FUNCTION_ARGS)
{
	text	   *t = PG_GETARG_TEXT_PP(0);

	PG_RETURN_BOOL(is_lab_form(VARDATA_ANY(t), VARSIZE_ANY_EXHDR(t)));
}

/*
 * risky_migrations.lab_moment(n bigint) returns text
 *
 * The n-th of the seeded moments, a second after the one before it; the first
 * is 2024-01-01 10:00:00.
 */
Datum
rm_lab_moment(PG_FUNCTION_ARGS)
{
	int64		n = PG_GETARG_INT64(0);
	int64		seconds;
	int			julian = date2j(2024, 1, 1);
	int			year;
	int			month;
	int			day;
	int			second;
	char		buf[32];

	if (n < 1 || n > MAX_ROWS)
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("there is no such moment in the lab"),
				 errdetail("Its number is out of range."),
				 errhint("Moments are numbered from 1.")));
	seconds = n - 1 + 10 * 3600;
	second = seconds % 86400;
	j2date(julian + (int) (seconds / 86400), &year, &month, &day);
	snprintf(buf, sizeof(buf), "%04d-%02d-%02d %02d:%02d:%02d", year, month, day,
			 second / 3600, second / 60 % 60, second % 60);
	PG_RETURN_TEXT_P(cstring_to_text(buf));
}

/* is created_at still a string? */
static bool
holds_strings(Oid relid)
{
	return get_atttype(relid, get_attnum(relid, "created_at")) != TIMESTAMPOID;
}

/* fills one table; names are the prefix and a number */
static void
seed_table(Oid nspid, Oid relid, const char *table, const char *prefix,
		   int64 n, int64 batch)
{
	Oid			types[] = {INT8OID, INT8OID};
	SPIPlanPtr	plan;
	TimestampTz last_notice = GetCurrentTimestamp();
	char	   *sql;

	sql = psprintf("INSERT INTO %s (name, created_at)"
				   " SELECT %s || i, " RM_SCHEMA ".lab_moment(i)%s"
				   " FROM pg_catalog.generate_series($1, $2) i",
				   lab_sql(nspid, table), quote_literal_cstr(prefix),
				   holds_strings(relid) ? "" : "::pg_catalog.timestamp");
	plan = SPI_prepare(sql, 2, types);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed for: %s", sql);
	for (int64 first = 1; first <= n; first += batch)
	{
		Datum		v[2];
		TimestampTz now;

		CHECK_FOR_INTERRUPTS();
		v[0] = Int64GetDatum(first);
		v[1] = Int64GetDatum(Min(n, first + batch - 1));
		if (SPI_execute_plan(plan, v, NULL, false, 0) != SPI_OK_INSERT)
			elog(ERROR, "SPI_execute_plan failed for: %s", sql);
		now = GetCurrentTimestamp();
		if (TimestampDifferenceExceeds(last_notice, now, 1000))
		{
			char		done[32];
			char		total[32];

			last_notice = now;
			rm_format_count(done, sizeof(done), DatumGetInt64(v[1]));
			rm_format_count(total, sizeof(total), n);
			ereport(NOTICE,
					(errmsg("%s of %s rows seeded (%d %%)", done, total,
							(int) (100 * DatumGetInt64(v[1]) / n))));
		}
	}
	SPI_freeplan(plan);
}

static bool
is_empty(Oid nspid, const char *table)
{
	rm_execute(psprintf("SELECT 1 FROM %s LIMIT 1", lab_sql(nspid, table)));
	return SPI_processed == 0;
}

/* the rows that the way back from 0002 could not restore are gone */
static void
forget_inexact_rows(Lab *lab)
{
	Oid			types[] = {OIDOID, OIDOID};
	Datum		v[] = {ObjectIdGetDatum(lab->small_relid), ObjectIdGetDatum(lab->large_relid)};

	rm_state_execute("UPDATE risky_migrations.migration SET inexact_rows = 0"
					 " WHERE relid IN ($1, $2) AND inexact_rows <> 0",
					 2, types, v, NULL);
}

/*
 * rm_seed(n bigint, batch bigint) returns bigint
 */
Datum
rm_seed(PG_FUNCTION_ARGS)
{
	int64		n = rm_count_argument(fcinfo, 0, "number of rows", 1, MAX_ROWS);
	int64		batch = rm_count_argument(fcinfo, 1, "batch", 1, RM_MAX_BATCH);
	int			save_nestlevel;
	Lab			lab;

	SPI_connect();
	need_lab(&lab);
	rm_check_owner(lab.small_relid, SMALL);
	rm_check_owner(lab.large_relid, LARGE);
	if (!rm_transaction_lock(RM_SEEDING, lab.nspid))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("the lab in schema \"%s\" is being seeded in another session",
						get_namespace_name(lab.nspid)),
				 errdetail("Process %d does it.", rm_runner_pid(RM_SEEDING, lab.nspid)),
				 errhint("Call it again when that transaction has ended.")));

	save_nestlevel = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	if (!is_empty(lab.nspid, SMALL) || !is_empty(lab.nspid, LARGE))
	{
		char		value[32];

		snprintf(value, sizeof(value), "%d", rm_lock_timeout);
		(void) set_config_option("lock_timeout", value, PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
		rm_execute(psprintf("TRUNCATE %s, %s RESTART IDENTITY",
							lab_sql(lab.nspid, SMALL), lab_sql(lab.nspid, LARGE)));
		ereport(NOTICE,
				(errmsg("the lab's tables held rows before; these are replaced")));
		forget_inexact_rows(&lab);
	}
	seed_table(lab.nspid, lab.small_relid, SMALL, "SmallRecord_", SMALL_ROWS, batch);
	seed_table(lab.nspid, lab.large_relid, LARGE, "LargeRecord_", n, batch);
	AtEOXact_GUC(false, save_nestlevel);
	SPI_finish();
	PG_RETURN_INT64(n);
}

/*
 * rm_list_large() returns json
 */
Datum
rm_list_large(PG_FUNCTION_ARGS)
{
	Lab			lab;
	int			save_nestlevel;
	Oid			save_userid;
	int			save_sec_context;
	MemoryContext caller_cxt = CurrentMemoryContext;
	text	   *result;

	SPI_connect();
	need_lab(&lab);
	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	save_nestlevel = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	SPI_execute(psprintf("SELECT pg_catalog.json_build_object('records',"
						 " coalesce(pg_catalog.json_agg(r), '[]'),"
						 " 'count', pg_catalog.count(*))"
						 " FROM (SELECT id, name, created_at FROM %s"
						 " ORDER BY id LIMIT 10) r", lab_sql(lab.nspid, LARGE)),
				false, 0);
	AtEOXact_GUC(false, save_nestlevel);
	{
		MemoryContext oldcxt = MemoryContextSwitchTo(caller_cxt);

		result = cstring_to_text(rm_result_text(0, 1));
		MemoryContextSwitchTo(oldcxt);
	}
	SPI_finish();
	PG_RETURN_TEXT_P(result);
}

/*
 * risky_migrations.lab_write(rows bigint) returns text
 *
 * What the write probe does: inserts a row and updates one of the first rows,
 * both with the truth in their names.  Returns the string it wrote.
 */
Datum
rm_lab_write(PG_FUNCTION_ARGS)
{
	int64		rows = rm_count_argument(fcinfo, 0, "number of rows", 1, MAX_ROWS);
	int64		id = 1 + (int64) (pg_prng_double(&pg_global_prng_state) * rows);
	int64		n = 1 + (int64) (pg_prng_double(&pg_global_prng_state) * MAX_ROWS / 2);
	char	   *written = TextDatumGetCString(DirectFunctionCall1(rm_lab_moment,
																  Int64GetDatum(n)));
	char	   *name = psprintf("written %s", written);
	MemoryContext caller_cxt = CurrentMemoryContext;
	Lab			lab;

	SPI_connect();
	need_lab(&lab);
	rm_execute(psprintf("INSERT INTO %s (name, created_at) VALUES (%s, %s)",
						lab_sql(lab.nspid, LARGE), quote_literal_cstr(name),
						quote_literal_cstr(written)));
	rm_execute(psprintf("UPDATE %s SET name = %s, created_at = %s WHERE id = " INT64_FORMAT,
						lab_sql(lab.nspid, LARGE), quote_literal_cstr(name),
						quote_literal_cstr(written), id));
	SPI_finish();
	MemoryContextSwitchTo(caller_cxt);
	PG_RETURN_TEXT_P(cstring_to_text(written));
}

/*
 * Compares every row of large_record with the truth that its name tells: the
 * column created_at always; the shadow column in rows where it has a value,
 * and in all rows once the backfill is done.  Needs SPI.
 */
static void
check_rows(Lab *lab, int64 *checked, int64 *wrong)
{
	static const char *const truth = "CASE WHEN name LIKE 'LargeRecord\\_%' THEN"
		" " RM_SCHEMA ".lab_moment(substr(name, 13)::int8)"
		" WHEN name LIKE 'written %' THEN substr(name, 9) END";
	AttrNumber	shadow = get_attnum(lab->large_relid, "created_at_new");
	StringInfoData condition;

	initStringInfo(&condition);
	appendStringInfo(&condition, "created_at IS DISTINCT FROM (%s)%s", truth,
					 holds_strings(lab->large_relid) ? "" : "::pg_catalog.timestamp");
	if (shadow != InvalidAttrNumber)
		appendStringInfo(&condition,
						 " OR %s created_at_new IS DISTINCT FROM (%s)::pg_catalog.timestamp",
						 steps_done(lab) > RM_BACKFILL ? "" : "created_at_new IS NOT NULL AND",
						 truth);
	rm_execute(psprintf("SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE %s) FROM %s",
						condition.data, lab_sql(lab->nspid, LARGE)));
	*checked = rm_result_int64(0, 1);
	*wrong = rm_result_int64(0, 2);
}

/*
 * rm_lab_check(OUT rows_checked bigint, OUT rows_wrong bigint)
 */
Datum
rm_lab_check(PG_FUNCTION_ARGS)
{
	Lab			lab;
	TupleDesc	desc;
	int64		checked;
	int64		wrong;
	Datum		values[2];
	bool		nulls[2] = {false, false};

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	SPI_connect();
	need_lab(&lab);
	look(&lab);
	check_rows(&lab, &checked, &wrong);
	SPI_finish();
	values[0] = Int64GetDatum(checked);
	values[1] = Int64GetDatum(wrong);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/*-------------------------------------------------------------------------
 * The comparison
 *-------------------------------------------------------------------------
 */

typedef struct Compare
{
	Lab			lab;
	int64		rows;
	Interval   *every;
	Interval   *timeout;
	const char *function_schema;	/* of rm_list_large() and the probes */
	int64		run_id;
	const char *approach;
	TimestampTz started;
	TimestampTz finished;
	int64		first_step;
	int64		last_step;
	int64		read_probe;
	int64		write_probe;
	int64		heap_before,
				heap_after;
	int64		index_before,
				index_after;
} Compare;

static void
do_seed(void *arg)
{
	Compare    *c = arg;
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(c->rows)};

	SPI_execute_with_args(psprintf("SELECT %s.rm_seed($1)", c->function_schema), 1,
						  types, v, NULL, false, 0);
}

static void
do_checkpoint(void *arg)
{
	rm_execute("CHECKPOINT");
}

static void
measure_sizes(Compare *c, int64 *heap, int64 *index)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(c->lab.large_relid)};

	SPI_execute_with_args("SELECT pg_catalog.pg_table_size($1), pg_catalog.pg_indexes_size($1)",
						  1, types, v, NULL, true, 0);
	*heap = rm_result_int64(0, 1);
	*index = rm_result_int64(0, 2);
}

static int64
last_step_id(void)
{
	rm_state_execute("SELECT coalesce(max(id), 0) FROM risky_migrations.step_log", 0,
					 NULL, NULL, NULL);
	return rm_result_int64(0, 1);
}

static int64
start_probe(Compare *c, const char *query)
{
	Oid			types[] = {TEXTOID, INTERVALOID, INTERVALOID};
	Datum		v[] = {CStringGetTextDatum(query), IntervalPGetDatum(c->every),
	IntervalPGetDatum(c->timeout)};

	SPI_execute_with_args(psprintf("SELECT %s.rm_probe_start($1, $2, $3)",
								   c->function_schema),
						  3, types, v, NULL, false, 0);
	return rm_result_int64(0, 1);
}

static void
do_start_probes(void *arg)
{
	Compare    *c = arg;

	measure_sizes(c, &c->heap_before, &c->index_before);
	c->first_step = last_step_id() + 1;
	c->read_probe = start_probe(c, psprintf("SELECT %s.rm_list_large()",
											c->function_schema));
	c->write_probe = start_probe(c, psprintf("SELECT " RM_SCHEMA ".lab_write(" INT64_FORMAT ")",
											 c->rows));
	c->started = GetCurrentTimestamp();
}

static void
do_stop_probes(void *arg)
{
	Compare    *c = arg;
	Oid			types[] = {INT8OID};
	Datum		v[1];
	int64		probes[] = {c->read_probe, c->write_probe};

	for (int i = 0; i < lengthof(probes); i++)
	{
		if (probes[i] == 0)
			continue;
		v[0] = Int64GetDatum(probes[i]);
		SPI_execute_with_args(psprintf("SELECT %s.rm_probe_stop($1)", c->function_schema),
							  1, types, v, NULL, false, 0);
	}
}

/* counts rows and probes' rows against the truth and writes the result down */
static void
do_record(void *arg)
{
	Compare    *c = arg;
	Lab			lab = c->lab;
	int64		checked;
	int64		wrong;
	int64		seeded;
	int64		inserted;
	Oid			types[16];
	Datum		v[16];
	int			i = 0;

	measure_sizes(c, &c->heap_after, &c->index_after);
	lab.cxt = CurrentMemoryContext;
	look(&lab);
	check_rows(&lab, &checked, &wrong);
	/* rows that are missing are wrong too */
	rm_execute(psprintf("SELECT count(*) FILTER (WHERE id <= " INT64_FORMAT "),"
						" count(*) FILTER (WHERE id > " INT64_FORMAT ") FROM %s",
						c->rows, c->rows, lab_sql(c->lab.nspid, LARGE)));
	seeded = rm_result_int64(0, 1);
	inserted = rm_result_int64(0, 2);
	wrong += c->rows - seeded;
	types[0] = INT8OID;
	v[0] = Int64GetDatum(c->write_probe);
	rm_state_execute("SELECT count(*) FROM risky_migrations.probe_sample"
					 " WHERE probe_id = $1 AND outcome = 'ok'", 1, types, v, NULL);
	wrong += Max(0, rm_result_int64(0, 1) - inserted);

	for (i = 0; i < 16; i++)
		types[i] = INT8OID;
	i = 0;
	v[i++] = Int64GetDatum(c->run_id);
	types[i] = TEXTOID;
	v[i++] = CStringGetTextDatum(c->approach);
	v[i++] = Int64GetDatum((int64) GetUserId());
	v[i++] = Int64GetDatum(c->rows);
	types[i] = TIMESTAMPTZOID;
	v[i++] = TimestampTzGetDatum(c->started);
	types[i] = TIMESTAMPTZOID;
	v[i++] = TimestampTzGetDatum(c->finished);
	v[i++] = Int64GetDatum(c->first_step);
	v[i++] = Int64GetDatum(c->last_step);
	v[i++] = Int64GetDatum(c->read_probe);
	v[i++] = Int64GetDatum(c->write_probe);
	v[i++] = Int64GetDatum(c->heap_before);
	v[i++] = Int64GetDatum(c->heap_after);
	v[i++] = Int64GetDatum(c->index_before);
	v[i++] = Int64GetDatum(c->index_after);
	v[i++] = Int64GetDatum(checked);
	v[i++] = Int64GetDatum(wrong);
	rm_state_execute("INSERT INTO risky_migrations.comparison (run_id, approach, owner,"
					 " rows, started_at, finished_at, first_step, last_step, read_probe,"
					 " write_probe, heap_bytes_before, heap_bytes_after,"
					 " index_bytes_before, index_bytes_after, rows_checked, rows_wrong)"
					 " VALUES (coalesce(nullif($1, 0), (SELECT coalesce(max(run_id), 0) + 1"
					 " FROM risky_migrations.comparison)), $2, $3::oid, $4, $5, $6, $7,"
					 " $8, $9, $10, $11, $12, $13, $14, $15, $16) RETURNING run_id",
					 i, types, v, NULL);
	c->run_id = rm_result_int64(0, 1);
}

static void
do_quiet(void *arg)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), QUIET_MS);
	long		left;

	while ((left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), until)) > 0)
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 left, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

static void
do_last_step(void *arg)
{
	((Compare *) arg)->last_step = last_step_id();
}

/*
 * Can as many workers be had as will be needed?  Asked before the lab is
 * emptied, by starting two probes; they end without a trace.
 */
static void
do_try_workers(void *arg)
{
	Compare    *c = arg;

	c->read_probe = start_probe(c, "SELECT 1");
	c->write_probe = start_probe(c, "SELECT 1");
}

static void
do_forget_probes(void *arg)
{
	Compare    *c = arg;
	Oid			types[] = {INT8OID, INT8OID};
	Datum		v[] = {Int64GetDatum(c->read_probe), Int64GetDatum(c->write_probe)};

	rm_state_execute("DELETE FROM risky_migrations.probe WHERE id IN ($1, $2)", 2, types,
					 v, NULL);
}

/* to one of the lab's targets, or -1 for online_rewrite */
static void
migrate(Compare *c, int target)
{
	if (target < 0)
		run_rewrite(&c->lab);
	else
		go_to(&c->lab, target);
}

/* one approach from a fresh lab to the recorded result */
static void
compare_approach(Compare *c, const char *approach, int target)
{
	MemoryContext cxt = CurrentMemoryContext;
	char		rows[32];

	c->approach = approach;
	c->read_probe = c->write_probe = 0;
	rm_format_count(rows, sizeof(rows), c->rows);
	ereport(NOTICE, (errmsg("%s: seeding %s rows", approach, rows)));
	go_to(&c->lab, 0);
	go_to(&c->lab, 1);
	rm_transaction(do_seed, c);
	rm_worker_run(psprintf("VACUUM (ANALYZE) %s", lab_sql(c->lab.nspid, LARGE)),
				  "VACUUM of the lab", NULL);
	if (has_privs_of_role(GetUserId(), ROLE_PG_CHECKPOINT))
		rm_transaction(do_checkpoint, c);

	ereport(NOTICE, (errmsg("%s: migrating under a read and a write probe", approach)));
	rm_transaction(do_start_probes, c);
	PG_TRY();
	{
		rm_transaction(do_quiet, c);
		migrate(c, target);
		rm_transaction(do_last_step, c);
		rm_transaction(do_quiet, c);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(cxt);
		error = CopyErrorData();
		FlushErrorState();
		rm_transaction(do_stop_probes, c);
		ReThrowError(error);
	}
	PG_END_TRY();
	c->finished = GetCurrentTimestamp();
	rm_transaction(do_stop_probes, c);
	ereport(NOTICE, (errmsg("%s: checking all rows", approach)));
	rm_transaction(do_record, c);
}

/* an interval argument in the range that probes take */
static Interval *
interval_argument(FunctionCallInfo fcinfo, int arg, const char *name)
{
	Interval   *given;
	Interval   *copy = palloc(sizeof(Interval));

	if (PG_ARGISNULL(arg))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be NULL", name),
				 errdetail("It is the interval that the probes are given."),
				 errhint("Give an interval such as '10 ms', or leave it out for the default.")));
	given = PG_GETARG_INTERVAL_P(arg);
	if (given->month != 0 || given->day != 0 || given->time < 1000 ||
		given->time > USECS_PER_HOUR)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s is out of range", name),
				 errdetail("It must be from 1 ms to 1 hour."),
				 errhint("Give an interval such as '10 ms'.")));
	memcpy(copy, given, sizeof(Interval));
	return copy;
}

/*
 * rm_compare(rows bigint, every interval, timeout interval)
 */
Datum
rm_compare(PG_FUNCTION_ARGS)
{
	Compare		c = {0};

	rm_procedure_begin(fcinfo, "rm_compare");
	c.rows = rm_count_argument(fcinfo, 0, "number of rows", 1, MAX_ROWS);
	c.every = interval_argument(fcinfo, 1, "every");
	c.timeout = interval_argument(fcinfo, 2, "timeout");
	c.function_schema = quote_identifier(get_namespace_name(get_func_namespace(fcinfo->flinfo->fn_oid)));
	c.lab.cxt = CurrentMemoryContext;
	c.lab.nspid = current_schema_oid();
	lock_lab(c.lab.nspid);
	PG_TRY();
	{
		rm_transaction(do_try_workers, &c);
		rm_transaction(do_stop_probes, &c);
		rm_transaction(do_forget_probes, &c);
		compare_approach(&c, "direct", 2);
		compare_approach(&c, "online_rewrite", -1);
		compare_approach(&c, "three_step", 5);
	}
	PG_FINALLY();
	{
		rm_runner_unlock(RM_RUNNER_LAB, c.lab.nspid);
	}
	PG_END_TRY();
	ereport(NOTICE,
			(errmsg("done"),
			 errhint("SELECT * FROM rm_comparison(); SELECT * FROM rm_timeline(); SELECT * FROM rm_lock_report();")));
	rm_procedure_end();
	PG_RETURN_VOID();
}
