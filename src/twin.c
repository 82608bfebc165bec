/*-------------------------------------------------------------------------
 *
 * twin.c
 *	  A table's twin: an empty copy, on which PostgreSQL shows what it would do.
 *
 * What an ALTER TABLE would make of indexes and constraints, whether it would
 * rewrite the table, and whether it would be refused, is known to PostgreSQL
 * alone.  So it is asked: CREATE TABLE (LIKE ... INCLUDING ALL) makes a twin,
 * the very ALTER is run on it, and its catalogs and counters tell.  The table
 * itself is locked with ACCESS SHARE only.
 *
 * A twin is made within rm_rehearse() and nowhere else: that is rolled back
 * whatever happens, so nothing of it remains and no lock either.
 *
 * Easy to get wrong: indexes of the twin, with their expressions, are the
 * table owner's, and whoever makes the twin may be a superuser.  They are made
 * as the owner, as REINDEX and ALTER TABLE do.
 *
 * Foreign keys, triggers, views, partitions and privileges are not copied.
 * Event triggers of ddl_command_end see the twin, in the subtransaction.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "compat.h"
#include "executor/spi.h"
#include "migration.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "state.h"
#include "twin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

/*
 * Gives its indexes and statistics the names prefix<OID of the original>, and its
 * identity sequences the type of the original's.
 */
static void
name_twins(Oid relid, Oid twin, const char *prefix)
{
	Oid			types[] = {OIDOID, OIDOID, TEXTOID};
	Datum		v[] = {ObjectIdGetDatum(relid), ObjectIdGetDatum(twin), CStringGetTextDatum(prefix)};
	List	   *commands = NIL;
	ListCell   *lc;

	rm_catalog_query("SELECT command FROM risky_migrations.name_twins($1, $2, $3)", 3, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
		commands = lappend(commands, rm_result_text(i, 1));
	foreach(lc, commands)
		rm_execute(lfirst(lc));
}

/*
 * Settings by which the twin would differ; they end with the subtransaction.
 * Returns the table's owner.
 */
static Oid
prepare(Oid relid)
{
	Relation	rel = table_open(relid, AccessShareLock);
	Oid			owner = rel->rd_rel->relowner;
	const char *am = OidIsValid(rel->rd_rel->relam) ? get_am_name(rel->rd_rel->relam) : "heap";

	table_close(rel, NoLock);
	(void) set_config_option("default_table_access_method", am, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	return owner;
}

/*
 * Where the owner of the table may make a twin of it: among temporary tables, where
 * nobody else sees it, or else in the table's schema.  42501 if in neither, although it
 * may be that ALTER TABLE asks for no such privilege.
 */
const char *
rm_twin_schema(Oid relid)
{
	HeapTuple	tup = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	Oid			nspid;
	Oid			owner;
	const char *role;
	const char *database;
	const char *schema;

	/* without a lock: it may be the root of a partition that is locked */
	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for relation %u", relid);
	nspid = ((Form_pg_class) GETSTRUCT(tup))->relnamespace;
	owner = ((Form_pg_class) GETSTRUCT(tup))->relowner;
	ReleaseSysCache(tup);
	if (rm_may_make_temporary(owner))
		return "pg_temp";
	schema = get_namespace_name(nspid);
	if (rm_may_create_in(nspid, owner))
		return schema;
	role = quote_identifier(GetUserNameFromId(owner, false));
	database = quote_identifier(get_database_name(MyDatabaseId));
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("the owner of table %s may make tables neither in its schema nor temporary ones",
					rm_relation_sql(relid)),
			 errdetail("The change is tried on an empty copy of the table first, which is %s's.", role),
			 errhint("GRANT TEMPORARY ON DATABASE %s TO %s, or GRANT CREATE ON SCHEMA %s TO %s.",
					 database, role, quote_identifier(schema), role)));
}

/*
 * Makes a twin of that name in that schema (neither is quoted; pg_temp is one).
 * Its indexes and statistics are called prefix<OID of the original>.  The errors
 * are PostgreSQL's own: not everything can be copied.
 */
RmTwin
rm_twin_make(Oid relid, const char *schema, const char *name, const char *prefix)
{
	RmTwin		twin;
	Oid			owner = prepare(relid);
	Oid			save_userid;
	int			save_sec_context;

	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	/* one who may not could not make an index there either */
	if (strcmp(schema, "pg_temp") == 0 ||
		rm_may_create_in(get_namespace_oid(schema, false), owner))
		SetUserIdAndSecContext(owner, save_sec_context | SECURITY_LOCAL_USERID_CHANGE);
	twin.sql = quote_qualified_identifier(schema, name);
	rm_execute(psprintf("CREATE TABLE %s (LIKE %s INCLUDING ALL)", twin.sql,
						rm_relation_sql(relid)));
	SetUserIdAndSecContext(save_userid, save_sec_context);
	twin.relid = RangeVarGetRelid(makeRangeVar(pstrdup(schema), pstrdup(name), -1),
								  NoLock, false);
	name_twins(relid, twin.relid, prefix);
	return twin;
}

/* the ALTER TABLE that is all about, if there is anything to alter */
void
rm_twin_alter(const RmTwin *twin, const char *clauses)
{
	if (clauses[0])
		rm_execute(psprintf("ALTER TABLE %s %s", twin->sql, clauses));
}
