/*-------------------------------------------------------------------------
 *
 * state.c
 *	  Access to the extension's own tables (schema risky_migrations).
 *
 * The state of every migration, the step log and the samples of the probes
 * are ordinary tables, written in the same transaction as the work they
 * describe.  The role that does the work usually may not write them (else it
 * could forge them), so each command here runs as their owner.  Two things
 * are easy to get wrong: the owner is often a superuser, so nothing of the
 * caller's may be evaluated meanwhile (search_path is pinned, and no command
 * contains text that came from the caller, only parameters); and the switch
 * of roles must be undone on every way out, also by error (the caller's
 * transaction or subtransaction abort restores user id and settings).
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "migration.h"
#include "miscadmin.h"
#include "state.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"

/* longest command of ours, and then some */
#define MAX_SQL 1536

/* how often others may drop something while one query describes it */
#define MAX_CATALOG_TRIES 10

static void
refuse_without_tables(const char *relname)
{
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_TABLE),
			 errmsg("table \"%s.%s\" does not exist", RM_SCHEMA, relname),
			 errdetail("The extension is not in this database, or was dropped meanwhile."),
			 errhint("Run CREATE EXTENSION risky_migrations in this database.")));
}

Oid
rm_state_relid(const char *relname, bool missing_ok)
{
	Oid			nspid = get_namespace_oid(RM_SCHEMA, true);
	Oid			relid = InvalidOid;

	if (OidIsValid(nspid))
		relid = get_relname_relid(relname, nspid);
	if (!OidIsValid(relid) && !missing_ok)
		refuse_without_tables(relname);
	return relid;
}

/*
 * Who owns the state tables.  The lock is kept to the end of the transaction,
 * so that DROP EXTENSION comes before it (42P01) or after the transaction.
 */
Oid
rm_state_owner(void)
{
	Relation	rel = try_relation_open(rm_state_relid("migration", false), AccessShareLock);
	Oid			owner;

	if (rel == NULL)
		refuse_without_tables("migration");
	owner = rel->rd_rel->relowner;
	relation_close(rel, NoLock);
	return owner;
}

/* a command of ours, planned; kept for the session, which repeats it often */
typedef struct StatePlan
{
	char		sql[MAX_SQL];	/* hash key */
	SPIPlanPtr	plan;
} StatePlan;

/* the plan for that text, made at its first use; as the tables' owner */
static SPIPlanPtr
get_plan(const char *sql, int nargs, Oid *argtypes)
{
	static HTAB *plans = NULL;
	StatePlan  *entry;
	bool		found;
	SPIPlanPtr	plan;

	Assert(strlen(sql) < MAX_SQL);
	if (plans == NULL)
	{
		HASHCTL		ctl = {.keysize = MAX_SQL,.entrysize = sizeof(StatePlan)};

		plans = hash_create("rm state plans", 64, &ctl, HASH_ELEM | HASH_STRINGS);
	}
	entry = hash_search(plans, sql, HASH_FIND, NULL);
	if (entry)
		return entry->plan;

	plan = SPI_prepare(sql, nargs, argtypes);
	if (plan == NULL || SPI_keepplan(plan) != 0)
		elog(ERROR, "could not prepare: %s", sql);
	entry = hash_search(plans, sql, HASH_ENTER, &found);
	entry->plan = plan;
	return plan;
}

/*
 * Until the GUC nest level ends.  Queries over the catalogs look costly to the
 * planner and are through in milliseconds; to compile them takes much longer.
 */
static void
without_jit(void)
{
	(void) set_config_option("jit", "off", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE,
							 true, 0, false);
}

/* one to be tried, see there */
typedef struct CatalogQuery
{
	const char *sql;
	int			nargs;
	Oid		   *argtypes;
	Datum	   *values;
} CatalogQuery;

static void
run_catalog_query(void *arg)
{
	CatalogQuery *q = arg;
	int			save_nestlevel = NewGUCNestLevel();
	int			rc;

	without_jit();
	rc = SPI_execute_with_args(q->sql, q->nargs, q->argtypes, q->values, NULL, false, 0);
	AtEOXact_GUC(false, save_nestlevel);
	if (rc != SPI_OK_SELECT)
		elog(ERROR, "SPI returned %s for: %s", SPI_result_code_string(rc), q->sql);
}

void
rm_catalog_query(const char *sql, int nargs, Oid *argtypes, Datum *values)
{
	CatalogQuery q = {.sql = sql,.nargs = nargs,.argtypes = argtypes,.values = values};
	ErrorData  *error;

	for (int tries = 1; (error = rm_try_here(run_catalog_query, &q, CurrentMemoryContext)) != NULL; tries++)
	{
		if (error->sqlerrcode != ERRCODE_INTERNAL_ERROR || tries == MAX_CATALOG_TRIES)
			ReThrowError(error);
		if (IsolationUsesXactSnapshot())
			ereport(ERROR,
					(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					 errmsg("could not serialize access due to concurrent DROP"),
					 errdetail("While the catalogs were read: %s.", error->message),
					 errhint("Begin the transaction again.")));
	}
}

void
rm_state_execute(const char *sql, int nargs, Oid *argtypes, Datum *values,
				 const char *nulls)
{
	Oid			save_userid;
	int			save_sec_context;
	int			save_nestlevel;
	int			rc;
	SPIPlanPtr	plan;

	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	save_nestlevel = NewGUCNestLevel();
	SetUserIdAndSecContext(rm_state_owner(),
						   save_sec_context | SECURITY_LOCAL_USERID_CHANGE);
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	without_jit();

	plan = get_plan(sql, nargs, argtypes);
	rc = SPI_execute_plan(plan, values, nulls, false, 0);

	AtEOXact_GUC(false, save_nestlevel);
	SetUserIdAndSecContext(save_userid, save_sec_context);

	if (rc < 0)
		elog(ERROR, "SPI returned %s for: %s", SPI_result_code_string(rc), sql);
}

Datum
rm_attnum_array(List *attnums)
{
	Datum	   *elems = palloc(sizeof(Datum) * Max(list_length(attnums), 1));
	int			n = 0;
	ListCell   *lc;

	foreach(lc, attnums)
		elems[n++] = Int16GetDatum(lfirst_int(lc));
	return PointerGetDatum(construct_array(elems, n, INT2OID, sizeof(int16), true, TYPALIGN_SHORT));
}

Datum
rm_int64_array(Datum *values, int n)
{
	return PointerGetDatum(construct_array(values, n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
										   TYPALIGN_DOUBLE));
}

Datum
rm_result_datum(int row, int col)
{
	bool		isnull;
	Datum		d = SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc,
								  col, &isnull);

	return isnull ? (Datum) 0 : d;
}

bool
rm_result_isnull(int row, int col)
{
	bool		isnull;

	(void) SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col,
						 &isnull);
	return isnull;
}

char *
rm_result_text(int row, int col)
{
	return SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col);
}

int64
rm_result_int64(int row, int col)
{
	return rm_result_isnull(row, col) ? 0 : DatumGetInt64(rm_result_datum(row, col));
}
