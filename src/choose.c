/*-------------------------------------------------------------------------
 *
 * choose.c
 *	  What plain ALTER TABLE would do, and which method is the right one.
 *
 *	rm_choose_method(spec)		method => 'auto'
 *	rm_advise(...)				the same as a report; starts nothing
 *
 * The choice:
 *
 *	direct		where ALTER TABLE rewrites nothing, rebuilds no index and reads
 *				no rows: it is over at once, whatever the size; and where all
 *				that it would work on is small, fewer than SMALL_ROWS rows in
 *				SMALL_BYTES at most: then it is over soon; and for a temporary
 *				table, for which nobody waits
 *	else		the first of the other methods that does not refuse
 *
 * If they all refuse there is an error that says why each does.  A large table
 * is never locked for long unless somebody has asked for the method direct by
 * its name.
 *
 * What ALTER TABLE would do is found out by letting it.  For each table
 * concerned (partitions and children have indexes and constraints of their own)
 * there is a twin, see twin.c, and the very ALTER is run on it.  Then
 *
 *	the heap has another relfilenode		it would be rewritten
 *	an index has another relfilenode		it would be rebuilt
 *	the twin has been scanned more often	constraints would be verified against
 *	than for that							the rows (PostgreSQL's statistics
 *											count scans, also of an empty table)
 *
 * ALTER TABLE also drops each foreign key of the column, on either side of it,
 * and makes it again, and that checks all rows of the referencing table unless
 * the comparison stays what it was.  Foreign keys are not copied to a twin.  So
 * for each of them there is another trial, in which the twin has that one, with
 * an empty table of the right types at its other end: is more scanned than
 * without it?
 *
 * What no copy can show is asked of the catalogs (direct_obstacles() in the
 * install script): what ALTER TABLE refuses because of views, triggers,
 * partition keys and the like.  Whether another method refuses is found out by
 * beginning it and undoing that.
 *
 * Where there can be no copy, the worst is assumed.
 *
 * Locks: ACCESS SHARE on the table, its partitions and children; on what a
 * foreign key binds to it, while its rows are counted.  Nothing of all this
 * remains: each trial is a subtransaction that is rolled back.
 *
 * Easy to get wrong:
 *
 * - The expression decides: text to varchar is no rewrite by a plain cast, and
 *	 is one by upper(c).  So do the settings: timestamp to timestamptz is none
 *	 while TimeZone is UTC.
 *
 * - A small table is not enough: a foreign key that is checked again reads the
 *	 table that refers to it, under ACCESS EXCLUSIVE on both.
 *
 * - Estimates (reltuples) are what they were at the last ANALYZE.  Nothing is
 *	 decided by them; the size is, which nothing can make out of date, and then
 *	 a count that ends at SMALL_ROWS.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/partition.h"
#include "catalog/pg_class.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_type.h"
#include "choose.h"
#include "commands/tablecmds.h"
#include "compat.h"
#include "dependents.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "optimizer/plancat.h"
#include "rewrite.h"
#include "state.h"
#include "steps.h"
#include "storage/lmgr.h"
#include "twin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

PG_FUNCTION_INFO_V1(rm_advise);

/* a table is small that has fewer rows, in no more bytes (heap and TOAST) */
#define SMALL_ROWS 10000
#define SMALL_BYTES (16 * 1024 * 1024)

/*-------------------------------------------------------------------------
 * What ALTER TABLE would do
 *-------------------------------------------------------------------------
 */

/* all that is found out; lives in the memory context of whoever asks */
typedef struct Advice
{
	List	   *columns;		/* of RmConversionDef: all that change */
	Oid			relid;
	char	   *not_copied;		/* why there is no copy, or NULL */
	char	   *not_altered;	/* why PostgreSQL refuses the ALTER, or NULL */
	bool		rewrites;
	List	   *rebuilt;		/* names of indexes, of char * */
	List	   *scans;			/* what is read, and why, of char * */
	List	   *peers;			/* OIDs of tables at the other end of foreign keys */
	List	   *concerned;		/* OIDs of tables whose rows it works on */
	int64		bytes_written;
	int64		rows_estimated;
	bool		temporary;		/* of this session, so that nobody waits */
	bool		small;			/* all concerned, together */
	int64		rows;			/* counted, if small */
} Advice;

/* one trial on a twin of one table */
typedef struct Trial
{
	const Advice *a;
	Oid			relid;
	Oid			fk;				/* foreign key that it has along, or 0 */
	MemoryContext cxt;

	bool		copied;
	bool		rewrites;
	List	   *rebuilt;		/* OIDs of the original indexes */
	int64		scans;			/* of the twin, and of what refers to it */
} Trial;

/* an index of the twin */
typedef struct TwinIndex
{
	Oid			original;
	Oid			filenode;
	bool		exclusion;
} TwinIndex;

static Oid
filenode(Oid relid)
{
	return DatumGetObjectId(DirectFunctionCall1(pg_relation_filenode,
												ObjectIdGetDatum(relid)));
}

/* how often this transaction has read a table from its beginning */
static int64
scans_of(Oid relid)
{
	return OidIsValid(relid) ?
		DatumGetInt64(DirectFunctionCall1(pg_stat_get_xact_numscans,
										  ObjectIdGetDatum(relid))) : 0;
}

/* the twin's indexes; their names tell the originals */
static List *
twin_indexes(const RmTwin *twin, const char *prefix)
{
	Relation	rel = table_open(twin->relid, NoLock);
	List	   *list = NIL;
	ListCell   *lc;

	foreach(lc, RelationGetIndexList(rel))
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);
		TwinIndex  *t = palloc0(sizeof(TwinIndex));

		if (strncmp(RelationGetRelationName(index), prefix, strlen(prefix)) == 0)
			t->original = (Oid) strtoul(RelationGetRelationName(index) + strlen(prefix), NULL, 10);
		t->filenode = filenode(lfirst_oid(lc));
		t->exclusion = index->rd_index->indisexclusion;
		index_close(index, NoLock);
		list = lappend(list, t);
	}
	table_close(rel, NoLock);
	return list;
}

static bool
has_filenode(List *indexes, Oid original, Oid node)
{
	ListCell   *lc;

	foreach(lc, indexes)
		if (((TwinIndex *) lfirst(lc))->original == original &&
			((TwinIndex *) lfirst(lc))->filenode == node)
			return true;
	return false;
}

/*
 * Gives the twin a foreign key like the one of that OID; returns the table that
 * refers, if it is not the twin.
 */
static Oid
add_foreign_key(const Trial *t, const RmTwin *twin, const char *schema)
{
	char	   *name = psprintf("rm_peer_%d", MyProcPid);
	Oid			types[] = {OIDOID, OIDOID, TEXTOID, TEXTOID};
	Datum		v[4];
	List	   *commands = NIL;
	ListCell   *lc;
	bool		refers;

	v[0] = ObjectIdGetDatum(t->fk);
	v[1] = ObjectIdGetDatum(t->relid);
	v[2] = CStringGetTextDatum(twin->sql);
	v[3] = CStringGetTextDatum(quote_qualified_identifier(schema, name));
	rm_catalog_query("SELECT peer_refers, command FROM risky_migrations.twin_foreign_key($1, $2, $3, $4)",
					 4, types, v);
	if (SPI_processed == 0)
		elog(ERROR, "foreign key %u is gone", t->fk);
	refers = DatumGetBool(rm_result_datum(0, 1));
	for (uint64 i = 0; i < SPI_processed; i++)
		commands = lappend(commands, rm_result_text(i, 2));
	foreach(lc, commands)
		rm_execute(lfirst(lc));
	return refers ?
		RangeVarGetRelid(makeRangeVar(pstrdup(schema), name, -1), NoLock, false) : InvalidOid;
}

/*
 * LIKE takes it that all CHECK constraints hold.  Those that are NOT VALID are
 * made so again on the twin, for nothing is read for their sake.
 */
static void
unprove_checks(const Trial *t, const RmTwin *twin)
{
	Oid			types[] = {OIDOID, TEXTOID};
	Datum		v[] = {ObjectIdGetDatum(t->relid), CStringGetTextDatum(twin->sql)};
	List	   *commands = NIL;
	ListCell   *lc;

	rm_catalog_query("SELECT pg_catalog.format('ALTER TABLE %s DROP CONSTRAINT %I, ADD CONSTRAINT %I %s',"
					 " $2, conname, conname, pg_catalog.pg_get_constraintdef(oid))"
					 " FROM pg_catalog.pg_constraint"
					 " WHERE conrelid = $1 AND contype = 'c' AND NOT convalidated",
					 2, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
		commands = lappend(commands, rm_result_text(i, 1));
	foreach(lc, commands)
		rm_execute(lfirst(lc));
}

/* to be rehearsed */
static void
try_on_twin(void *arg)
{
	Trial	   *t = arg;
	Relation	rel = table_open(t->relid, AccessShareLock);
	Oid			owner = rel->rd_rel->relowner;
	Oid			caller;
	int			sec_context;
	const char *schema = rm_may_create_in(RelationGetNamespace(rel), owner) ?
		get_namespace_name(RelationGetNamespace(rel)) : "pg_temp";
	char	   *prefix = psprintf("rm_x_%d_", MyProcPid);
	RmTwin		twin;
	Oid			peer = InvalidOid;
	List	   *before;
	Oid			heap_before;
	int64		scans_before;
	ListCell   *lc;

	table_close(rel, NoLock);

	/* all this ends with the subtransaction */
	GetUserIdAndSecContext(&caller, &sec_context);
	SetUserIdAndSecContext(owner, sec_context | SECURITY_LOCAL_USERID_CHANGE);
	(void) set_config_option("track_counts", "on", PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	(void) set_config_option("client_min_messages", "error", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);

	twin = rm_twin_make(t->relid, schema, psprintf("rm_twin_%d", MyProcPid), prefix);
	unprove_checks(t, &twin);
	if (OidIsValid(t->fk))
		peer = add_foreign_key(t, &twin, schema);
	before = twin_indexes(&twin, prefix);
	heap_before = filenode(twin.relid);
	scans_before = scans_of(twin.relid) + scans_of(peer);
	t->copied = true;

	rm_twin_alter(&twin, rm_alter_clauses(t->a->columns, t->a->relid, false));

	t->rewrites = filenode(twin.relid) != heap_before;
	t->scans = scans_of(twin.relid) + scans_of(peer) - scans_before - t->rewrites;
	foreach(lc, twin_indexes(&twin, prefix))
	{
		TwinIndex  *index = lfirst(lc);
		MemoryContext oldcxt;

		if (has_filenode(before, index->original, index->filenode))
			continue;
		/* building an exclusion constraint's index looks at the rows twice */
		t->scans -= index->exclusion ? 2 : 1;
		oldcxt = MemoryContextSwitchTo(t->cxt);
		t->rebuilt = lappend_oid(t->rebuilt, index->original);
		MemoryContextSwitchTo(oldcxt);
	}
}

/* may this error be what a method, or PostgreSQL, refuses with? */
static bool
is_refusal(const ErrorData *error)
{
	int			category = ERRCODE_TO_CATEGORY(error->sqlerrcode);

	return category != ERRCODE_TO_CATEGORY(ERRCODE_QUERY_CANCELED) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_INSUFFICIENT_RESOURCES) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_TRANSACTION_ROLLBACK) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_INTERNAL_ERROR) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_IO_ERROR) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_READ_ONLY_SQL_TRANSACTION) &&
		error->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE;
}

/* NULL, or the error; what is nobody's refusal is raised */
static ErrorData *
rehearse(void (*work) (void *arg), void *arg)
{
	ErrorData  *error = rm_rehearse(work, arg, CurrentMemoryContext);

	if (error && !is_refusal(error))
		ReThrowError(error);
	return error;
}

static char *
error_text(const ErrorData *error)
{
	return error->detail ? psprintf("%s. %s", error->message, error->detail) :
		pstrdup(error->message);
}

static const char *
name_of(Oid relid)
{
	return rm_relation_sql(relid);
}

static int64
size_of(Oid relid)
{
	return DatumGetInt64(DirectFunctionCall2(pg_relation_size, ObjectIdGetDatum(relid),
											 CStringGetTextDatum("main")));
}

/* bytes of heap and TOAST */
static int64
table_size(Oid relid)
{
	return DatumGetInt64(DirectFunctionCall1(pg_table_size, ObjectIdGetDatum(relid)));
}

/* asks the catalogs about columns of a table; the rows are in SPI_tuptable */
static void
query_columns(const char *sql, Oid relid, List *attnums)
{
	Oid			types[] = {OIDOID, INT2ARRAYOID};
	Datum		v[] = {ObjectIdGetDatum(relid), rm_attnum_array(attnums)};

	rm_catalog_query(sql, 2, types, v);
}

/* the CHECK constraints that are verified again, where something is */
static void
note_checks(Advice *a, Oid relid)
{
	query_columns("SELECT pg_catalog.quote_ident(conname) FROM pg_catalog.pg_constraint"
				  " WHERE conrelid = $1 AND contype = 'c' AND conkey OPERATOR(pg_catalog.&&) $2"
				  " AND convalidated ORDER BY conname", relid, rm_attnums_of(a->columns, relid));
	for (uint64 i = 0; i < SPI_processed; i++)
		a->scans = lappend(a->scans, psprintf("%s: check constraint %s", name_of(relid),
											  rm_result_text(i, 1)));
	if (SPI_processed == 0)
		a->scans = lappend(a->scans, pstrdup(name_of(relid)));
}

/* one foreign key of the columns */
typedef struct ForeignKey
{
	Oid			oid;
	char	   *name;
	Oid			referring;
	Oid			peer;
	bool		validated;
} ForeignKey;

static List *
foreign_keys(const Advice *a, Oid relid)
{
	List	   *list = NIL;

	query_columns("SELECT oid, pg_catalog.quote_ident(conname), conrelid,"
				  " CASE conrelid WHEN $1 THEN confrelid ELSE conrelid END, convalidated"
				  " FROM pg_catalog.pg_constraint WHERE contype = 'f' AND conparentid = 0"
				  " AND (conrelid = $1 AND conkey OPERATOR(pg_catalog.&&) $2"
				  " OR confrelid = $1 AND confkey OPERATOR(pg_catalog.&&) $2)"
				  " ORDER BY conname, oid", relid, rm_attnums_of(a->columns, relid));
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		ForeignKey *k = palloc0(sizeof(ForeignKey));

		k->oid = DatumGetObjectId(rm_result_datum(i, 1));
		k->name = rm_result_text(i, 2);
		k->referring = DatumGetObjectId(rm_result_datum(i, 3));
		k->peer = DatumGetObjectId(rm_result_datum(i, 4));
		k->validated = DatumGetBool(rm_result_datum(i, 5));
		list = lappend(list, k);
	}
	return list;
}

/* does ALTER TABLE check it against the rows?  base: the trial without it */
static void
try_foreign_key(Advice *a, const Trial *base, const ForeignKey *k)
{
	Trial		t = {.a = a,.relid = base->relid,.fk = k->oid,.cxt = base->cxt};
	ErrorData  *error;

	if (k->peer != a->relid)
		a->peers = list_append_unique_oid(a->peers, k->peer);
	if (!k->validated)
		return;
	error = rehearse(try_on_twin, &t);
	if (error && t.copied && a->not_altered == NULL)
		a->not_altered = error_text(error);
	if (error == NULL && t.scans <= base->scans)
		return;
	a->scans = lappend(a->scans, psprintf("%s: foreign key %s", name_of(k->referring), k->name));
	a->concerned = list_append_unique_oid(a->concerned, k->referring);
}

/* what it does to one table: the one that was named, a partition, a child */
static void
examine_member(Advice *a, Oid relid)
{
	bool		stored = get_rel_relkind(relid) == RELKIND_RELATION;
	Trial		t = {.a = a,.relid = relid,.cxt = CurrentMemoryContext};
	ErrorData  *error;
	ListCell   *lc;

	if (!stored && get_rel_relkind(relid) != RELKIND_PARTITIONED_TABLE)
		return;
	error = rehearse(try_on_twin, &t);
	if (error && t.copied)
	{
		if (a->not_altered == NULL)
			a->not_altered = error_text(error);
		return;
	}
	if (error)
	{
		a->not_copied = error_text(error);
		t.rewrites = true;
	}
	if (stored)
	{
		Relation	rel = table_open(relid, NoLock);
		List	   *indexes = t.rewrites ? RelationGetIndexList(rel) : t.rebuilt;
		BlockNumber pages;
		double		tuples;
		double		allvisfrac;

		a->rewrites |= t.rewrites;
		if (t.rewrites)
			a->bytes_written += table_size(relid);
		foreach(lc, indexes)
		{
			a->rebuilt = lappend(a->rebuilt, (char *) name_of(lfirst_oid(lc)));
			a->bytes_written += size_of(lfirst_oid(lc));
		}
		if (t.scans > 0 && !t.rewrites)
			note_checks(a, relid);
		if (t.rewrites || t.rebuilt || t.scans > 0)
			a->concerned = list_append_unique_oid(a->concerned, relid);
		table_relation_estimate_size(rel, NULL, &pages, &tuples, &allvisfrac);
		a->rows_estimated += (int64) tuples;
		table_close(rel, NoLock);
	}
	foreach(lc, foreign_keys(a, relid))
		try_foreign_key(a, &t, lfirst(lc));
}

/*-------------------------------------------------------------------------
 * Small?
 *-------------------------------------------------------------------------
 */

/* rows that this transaction sees, up to limit */
static int64
count_rows(Oid relid, int64 limit)
{
	Relation	rel = table_open(relid, NoLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	TableScanDesc scan = table_beginscan(rel, GetActiveSnapshot(), 0, NULL);
	int64		rows = 0;

	while (rows < limit && table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		CHECK_FOR_INTERRUPTS();
		rows++;
	}
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
	return rows;
}

/* the tables that hold the rows of these, locked */
static List *
storage_of(List *relids)
{
	List	   *result = NIL;
	ListCell   *lc;
	ListCell   *lm;

	foreach(lc, relids)
	{
		LockRelationOid(lfirst_oid(lc), AccessShareLock);
		foreach(lm, find_all_inheritors(lfirst_oid(lc), AccessShareLock, NULL))
			if (get_rel_relkind(lfirst_oid(lm)) == RELKIND_RELATION)
				result = list_append_unique_oid(result, lfirst_oid(lm));
	}
	return result;
}

/* the size first, so that the count reads no more than that */
static void
look_whether_small(Advice *a)
{
	List	   *relids = storage_of(a->concerned);
	int64		bytes = 0;
	ListCell   *lc;

	foreach(lc, relids)
		bytes += table_size(lfirst_oid(lc));
	if (bytes > SMALL_BYTES)
		return;
	foreach(lc, relids)
		a->rows += count_rows(lfirst_oid(lc), SMALL_ROWS - a->rows);
	a->small = a->rows < SMALL_ROWS;
}

static bool
costs_nothing(const Advice *a)
{
	return a->columns != NIL && !a->rewrites && a->rebuilt == NIL && a->scans == NIL;
}

/* is direct the method of choice, if it does not refuse? */
static bool
wants_direct(const Advice *a)
{
	return a->columns != NIL && (a->not_altered || a->temporary || costs_nothing(a) || a->small);
}

/* everything; the table is open and locked, and SPI connected */
static void
examine(Advice *a)
{
	ListCell   *lc;

	foreach(lc, find_all_inheritors(a->relid, AccessShareLock, NULL))
		examine_member(a, lfirst_oid(lc));
	look_whether_small(a);
}

/*-------------------------------------------------------------------------
 * The methods
 *-------------------------------------------------------------------------
 */

static bool
is_inherited(Oid relid, AttrNumber attnum)
{
	HeapTuple	tup = SearchSysCacheAttNum(relid, attnum);
	bool		inherited;

	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for attribute %d of relation %u", attnum, relid);
	inherited = ((Form_pg_attribute) GETSTRUCT(tup))->attinhcount > 0;
	ReleaseSysCache(tup);
	return inherited;
}

/* what is in the way of ALTER TABLE at one table, or NULL */
static char *
direct_obstacles(Oid relid, AttrNumber attnum)
{
	StringInfoData buf;
	Relation	rel = relation_open(relid, NoLock);
	Bitmapset  *column = bms_make_singleton(attnum - FirstLowInvalidHeapAttributeNumber);

	initStringInfo(&buf);
	if (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE &&
		has_partition_attrs(rel, column, NULL))
		appendStringInfo(&buf, ", the partition key of %s", name_of(relid));
	if (OidIsValid(rel->rd_rel->reloftype))
		appendStringInfo(&buf, ", the type that the table %s is of", name_of(relid));
	query_columns("SELECT obstacle FROM risky_migrations.direct_obstacles($1, $2[1])",
				  relid, list_make1_int(attnum));
	for (uint64 i = 0; i < SPI_processed; i++)
		appendStringInfo(&buf, ", %s", rm_result_text(i, 1));
	if (buf.len == 0)
		find_composite_type_dependencies(rel->rd_rel->reltype, rel, NULL);
	relation_close(rel, NoLock);
	return buf.len ? buf.data + 2 : NULL;
}

/* what only an ALTER TABLE under its lock would say */
static void
refuse_direct(RmMigration *m, const Advice *a)
{
	char	   *obstacles = NULL;
	ListCell   *lc;
	ListCell   *col;

	if (a->not_altered)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg_internal("%s", a->not_altered)));
	foreach(col, m->columns)
	{
		const RmConversionDef *c = lfirst(col);

		if (is_inherited(m->relid, c->attnum))
			obstacles = "the table that it is inherited from";
		foreach(lc, find_all_inheritors(m->relid, AccessShareLock, NULL))
			if (obstacles == NULL)
				obstacles = direct_obstacles(lfirst_oid(lc), get_attnum(lfirst_oid(lc), c->column));
		if (obstacles)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("ALTER TABLE refuses to change the column \"%s\" of %s",
							c->column, m->relation),
					 errdetail("In its way: %s.", obstacles),
					 errhint("Drop what is in the way, and make it again afterwards.")));
	}
}

/* the same ALTER, on an empty copy */
static void
refuse_online_rewrite(RmMigration *m, const Advice *a)
{
	rm_rewrite_rehearse(m);
}

/* the same ALTER, by a method that builds what hangs on the column anew */
static void
refuse_three_step(RmMigration *m, const Advice *a)
{
	(void) rm_dependents_derive(m, true, CurrentMemoryContext);
}

/*
 * The methods in the order in which they are preferred.  refuse raises what
 * rm_migration_plan() does not.
 */
static const struct
{
	const RmMethod *method;
	void		(*refuse) (RmMigration *m, const Advice *a);
}			methods[] =
{
	{
		&rm_method_direct, refuse_direct
	},
	{
		&rm_method_online_rewrite, refuse_online_rewrite
	},
	{
		&rm_method_three_step, refuse_three_step
	},
};

/* a method as it is tried */
typedef struct Attempt
{
	int			i;				/* in methods[] */
	const RmMigrationSpec *asked;
	const Advice *a;
} Attempt;

/* to be rehearsed */
static void
begin_method(void *arg)
{
	Attempt    *t = arg;
	RmMigrationSpec spec = *t->asked;

	rm_spec_use_method(&spec, methods[t->i].method);
	methods[t->i].refuse(rm_migration_plan(&spec, CurrentMemoryContext), t->a);
}

/* what came of it: one for each of methods[] */
typedef struct Choice
{
	const RmMethod *method;		/* NULL: none can */
	char	   *reason;
	ErrorData  *refusals[lengthof(methods)];
} Choice;

/* what ALTER TABLE would do, in one sentence about it */
static char *
cost_text(const Advice *a)
{
	if (a->not_altered)
		return "PostgreSQL refuses the ALTER TABLE";
	if (a->columns == NIL)
		return "no column changes, the table is only written anew";
	if (costs_nothing(a))
		return "ALTER TABLE rewrites nothing, rebuilds no index and reads no rows";
	if (a->not_copied)
		return "no copy can be made to see what ALTER TABLE would do";
	if (a->rewrites)
		return "ALTER TABLE would rewrite the table";
	if (a->rebuilt)
		return list_length(a->rebuilt) == 1 ?
			psprintf("ALTER TABLE would rebuild the index %s", (char *) linitial(a->rebuilt)) :
			psprintf("ALTER TABLE would rebuild %d indexes", list_length(a->rebuilt));
	return psprintf("ALTER TABLE would read all rows (%s)", (char *) linitial(a->scans));
}

/* without what follows, nor the full stop */
static char *
first_line(char *text)
{
	int			len = strcspn(text, "\n");

	if (len > 0 && text[len - 1] == '.')
		len--;
	text[len] = '\0';
	return text;
}

static char *
reason_text(const Advice *a, const Choice *c)
{
	StringInfoData buf;

	initStringInfo(&buf);
	appendStringInfoString(&buf, cost_text(a));
	if (a->columns == NIL || a->not_altered || costs_nothing(a))
		 /* that is all */ ;
	else if (a->temporary)
		appendStringInfoString(&buf, ", but it is a temporary table");
	else if (a->small)
		appendStringInfo(&buf, ", but there are only few rows (%lld)", (long long) a->rows);
	else
		appendStringInfoString(&buf, " under ACCESS EXCLUSIVE");
	for (int i = 0; i < lengthof(methods); i++)
		if (c->method && methods[i].method == c->method)
			break;
		else if (c->refusals[i] && (methods[i].method != &rm_method_direct || wants_direct(a)))
			appendStringInfo(&buf, "; %s cannot do it: %s", methods[i].method->name,
							 first_line(error_text(c->refusals[i])));
	return buf.data;
}

/* asks all methods if told to, else until one is found */
static void
choose(Advice *a, const RmMigrationSpec *spec, bool all, Choice *c)
{
	for (int i = 0; i < lengthof(methods); i++)
	{
		Attempt		t = {.i = i,.asked = spec,.a = a};
		bool		candidate = methods[i].method != &rm_method_direct || wants_direct(a);

		/* the others change a column, or do nothing */
		if (a->columns == NIL && methods[i].method != &rm_method_online_rewrite)
			continue;
		if (!candidate && !all)
			continue;
		c->refusals[i] = rehearse(begin_method, &t);
		if (candidate && c->method == NULL && c->refusals[i] == NULL)
			c->method = methods[i].method;
		if (c->method && !all)
			break;
	}
	c->reason = reason_text(a, c);
}

static void
begin_advice(Advice *a, const RmMigrationSpec *spec)
{
	Relation	rel = rm_migration_open(spec, &a->columns);

	a->relid = spec->relid;
	a->temporary = RelationUsesLocalBuffers(rel);
	relation_close(rel, NoLock);
	examine(a);
}

/*
 * method => 'auto': sets the method of what is asked for and why (in cxt), and
 * says so.  0A000 with all reasons if there is none.  Needs SPI.
 */
void
rm_choose_method(RmMigrationSpec *spec, MemoryContext cxt)
{
	Advice		a = {0};
	Choice		c = {0};
	StringInfoData detail;
	StringInfoData hint;

	spec->all_steps = true;
	begin_advice(&a, spec);
	choose(&a, spec, false, &c);
	if (c.method)
	{
		MemoryContext oldcxt = MemoryContextSwitchTo(cxt);

		rm_spec_use_method(spec, c.method);
		spec->method_reason = pstrdup(c.reason);
		MemoryContextSwitchTo(oldcxt);
		ereport(NOTICE,
				(errmsg("method %s is chosen: %s", c.method->name, c.reason)));
		return;
	}
	initStringInfo(&detail);
	initStringInfo(&hint);
	appendStringInfo(&detail, "%s%s.", cost_text(&a),
					 a.columns == NIL || wants_direct(&a) ? "" : " under ACCESS EXCLUSIVE");
	detail.data[0] = pg_toupper((unsigned char) detail.data[0]);
	for (int i = 0; i < lengthof(methods); i++)
	{
		if (c.refusals[i] == NULL)
			continue;
		appendStringInfo(&detail, "\n%s: %s", methods[i].method->name, error_text(c.refusals[i]));
		if (c.refusals[i]->hint)
			appendStringInfo(&hint, "%s%s: %s", hint.len ? "\n" : "", methods[i].method->name,
							 c.refusals[i]->hint);
	}
	if (a.columns && !wants_direct(&a))
		appendStringInfo(&hint, "%sWhere nobody is waiting for the table, give the method direct by its name.",
						 hint.len ? "\n" : "");
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 a.columns ? errmsg("no method can change the %s of %s", rm_columns_text(a.columns),
								rm_relation_sql(spec->relid)) :
			 errmsg("no method can write %s anew", rm_relation_sql(spec->relid)),
			 errdetail_internal("%s", detail.data),
			 errhint("%s", hint.len ? hint.data : "Deal with what is in the way, then call it again.")));
}

/*-------------------------------------------------------------------------
 * rm_advise
 *-------------------------------------------------------------------------
 */

/* the names of relations, as text[] wants them */
static List *
names_of(List *relids)
{
	List	   *names = NIL;
	ListCell   *lc;

	foreach(lc, relids)
		names = lappend(names, (char *) name_of(lfirst_oid(lc)));
	return names;
}

static List *
refusal_texts(const Choice *c)
{
	List	   *texts = NIL;

	for (int i = 0; i < lengthof(methods); i++)
		if (c->refusals[i])
			texts = lappend(texts, psprintf("%s: %s", methods[i].method->name,
											error_text(c->refusals[i])));
	return texts;
}

/* a copy cannot be made where nothing can be written */
static void
refuse_read_only(void)
{
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("rm_advise() cannot run during recovery"),
				 errdetail("It tries the change on an empty copy, which a standby cannot make."),
				 errhint("Run it on the primary server.")));
	if (XactReadOnly)
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot execute rm_advise() in a read-only transaction"),
				 errdetail("It tries the change on an empty copy, and undoes that."),
				 errhint("Call it in a transaction that is READ WRITE.")));
}

/*
 * rm_advise(relation text, column_name text, new_type text, using_expr text)
 * returns (rewrites boolean, indexes_rebuilt text[], scans text[],
 *			lock_mode text, also_locked text[], bytes_written bigint,
 *			rows_estimated bigint, method text, reason text, refusals text[])
 *
 * The first three are NULL where there can be no copy, or no such ALTER.
 */
Datum
rm_advise(PG_FUNCTION_ARGS)
{
	RmMigrationSpec spec = {.all_steps = true};
	MemoryContext cxt = CurrentMemoryContext;
	Advice		a = {0};
	Choice		c = {0};
	Datum		v[10];
	bool		n[10] = {false};
	TupleDesc	desc;
	MemoryContext oldcxt;

	refuse_read_only();
	(void) rm_state_relid("migration", false);
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	spec.column = rm_text_argument(fcinfo, 1, "column_name");
	spec.new_type = rm_text_argument(fcinfo, 2, "new_type");
	spec.using_expr = PG_ARGISNULL(3) ? NULL : rm_text_argument(fcinfo, 3, "using_expr");
	spec.relid = rm_find_relation(rm_text_argument(fcinfo, 0, "relation"));

	SPI_connect();
	begin_advice(&a, &spec);
	choose(&a, &spec, true, &c);

	oldcxt = MemoryContextSwitchTo(cxt);
	n[0] = n[1] = n[2] = n[5] = a.not_copied || a.not_altered;
	v[0] = BoolGetDatum(a.rewrites);
	v[1] = rm_settings_array(a.rebuilt);
	v[2] = rm_settings_array(a.scans);
	v[3] = CStringGetTextDatum("ACCESS EXCLUSIVE");
	v[4] = rm_settings_array(names_of(a.peers));
	v[5] = Int64GetDatum(a.bytes_written);
	v[6] = Int64GetDatum(a.rows_estimated);
	n[7] = c.method == NULL;
	if (c.method)
		v[7] = CStringGetTextDatum(c.method->name);
	v[8] = CStringGetTextDatum(c.reason);
	v[9] = rm_settings_array(refusal_texts(&c));
	MemoryContextSwitchTo(oldcxt);
	SPI_finish();
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), v, n)));
}
