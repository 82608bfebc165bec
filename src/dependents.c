/*-------------------------------------------------------------------------
 *
 * dependents.c
 *	  What hangs on the column that changes, and how it gets to another one.
 *
 * ALTER TABLE ... TYPE takes a column's indexes, constraints, default and
 * statistics along.  three_step puts another column in its place, so all of
 * that has to be made on the other column, as ALTER TABLE would have made it.
 *
 * How it would have made it is not for us to say: PostgreSQL is asked.  In a
 * subtransaction that is always rolled back there is a twin, an empty copy of
 * the table (see twin.c), on which the very ALTER is run.  Then
 * its catalogs hold the definitions, with operator classes, casts in
 * predicates and everything, for the new type; and where PostgreSQL refuses,
 * it does so before anything of the user's has been changed.  For the way back
 * the twin's column keeps its type.  The column of the twin is given the name
 * that the other column has while things are built on it.
 *
 * Reading the catalogs is SQL: risky_migrations.dependents() in the install
 * script.  It gives, for each thing, the commands that build it under a name
 * of ours (rm_n_<migration>_<OID of the original> on the new column, rm_o_...
 * on the old one), validate it, put it in force under its own name, and put
 * the present one out of force.
 *
 * Of a partitioned table each member, itself and all that is below it, is asked
 * for by itself, with a twin of its own: partitions may have other columns, and
 * indexes and constraints of theirs.  What a partition has from its parent (an
 * attached index, a CHECK, a foreign key) is built or proven in the partition,
 * where the rows are, and comes into force with the parent's.  All members'
 * things make one list.
 *
 * So it is with a table and its children, where nothing but CHECK and NOT NULL is the
 * parent's.  A child that has defined such a thing itself, besides inheriting it, keeps
 * it when it is taken away, and pg_dump writes it down for the child: so it has to be
 * made there too, before the parent's is merged into it.  That a child has defined the
 * column itself is marked in pg_attribute alone (rm_swap_definers).
 *
 * Easy to get wrong: what has been built is told by the catalogs alone, by
 * name, never by what we remember, for a crash or somebody else's DDL may come
 * between any two commits.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/dependency.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/objectaddress.h"
#include "catalog/pg_attribute.h"
#include "catalog/pg_class.h"
#include "catalog/pg_constraint.h"
#include "catalog/pg_index.h"
#include "catalog/pg_statistic_ext.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "definitions.h"
#include "dependents.h"
#include "executor/spi.h"
#include "leaves.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "risky_migrations.h"
#include "state.h"
#include "twin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/* columns of risky_migrations.dependents(), and of the table of their rows */
enum
{
	D_ORD = 1, D_KIND, D_NAME, D_RELATION, D_PEER, D_BUILD_NAME, D_BUILD_SQL,
	D_BY_WORKER, D_VALIDATE_SQL, D_MAKE_SQL, D_TAKE_SQL, D_DROP_SQL
};

/* kinds, in the order in which they come into force */
static const char *const kinds[] = {
	"not null", "column", "default", "identity", "sequence", "index", "primary key",
	"unique constraint", "replica identity", "check constraint", "foreign key", "statistics"
};

static bool
is_kind(const RmDependent *d, const char *kind)
{
	return strcmp(d->kind, kind) == 0;
}

/* an index, or a constraint that is made of one? */
static bool
is_index(const RmDependent *d)
{
	return is_kind(d, "index") || is_kind(d, "primary key") || is_kind(d, "unique constraint");
}

/* the result as a list of RmDependent in cxt */
static List *
read_result(MemoryContext cxt)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(cxt);
	List	   *list = NIL;

	for (uint64 i = 0; i < SPI_processed; i++)
	{
		RmDependent *d = palloc0(sizeof(RmDependent));

		d->ord = rm_result_int64(i, D_ORD);
		d->kind = rm_result_text(i, D_KIND);
		d->name = rm_result_text(i, D_NAME);
		d->relid = DatumGetObjectId(rm_result_datum(i, D_RELATION));
		if (!rm_result_isnull(i, D_PEER))
			d->peer = DatumGetObjectId(rm_result_datum(i, D_PEER));
		d->build_name = rm_result_text(i, D_BUILD_NAME);
		d->build_sql = rm_result_text(i, D_BUILD_SQL);
		d->by_worker = DatumGetBool(rm_result_datum(i, D_BY_WORKER));
		d->validate_sql = rm_result_text(i, D_VALIDATE_SQL);
		d->make_sql = rm_result_text(i, D_MAKE_SQL);
		if (!rm_result_isnull(i, D_TAKE_SQL))
			d->take_sql = rm_settings_list(rm_result_datum(i, D_TAKE_SQL));
		d->drop_sql = rm_result_text(i, D_DROP_SQL);
		if (d->build_sql == NULL && d->make_sql == NULL &&
			(d->build_name || is_index(d)))
			elog(ERROR, "could not derive the definition of %s \"%s\"", d->kind, d->name);
		list = lappend(list, d);
	}
	MemoryContextSwitchTo(oldcxt);
	return list;
}

/*-------------------------------------------------------------------------
 * The twin
 *-------------------------------------------------------------------------
 */

/* what is asked of the twin */
typedef struct Twin
{
	const RmMigration *m;
	Oid			relid;			/* the member whose twin it is */
	AttrNumber	attnum;			/* on which the things hang */
	AttrNumber	other;			/* for which they are wanted, 0 if not there yet */
	const char *type;			/* to be changed to, or NULL */
	bool		new_side;
	MemoryContext cxt;
	List	   *list;
} Twin;

/* makes the twin, with its column called build_column; returns its OID */
static Oid
make_twin(const Twin *t, const char *build_column)
{
	const char *column = get_attname(t->relid, t->attnum, false);
	RmTwin		twin = rm_twin_make(t->relid, get_namespace_name(get_rel_namespace(t->relid)),
									/* of what is not a migration yet there may be several */
									psprintf("rm_twin_%lld_%d", (long long) t->m->id, MyProcPid),
									psprintf("rm_x_%lld_", (long long) t->m->id));

	if (t->other > 0)
		rm_execute(psprintf("ALTER TABLE %s DROP COLUMN %s", twin.sql,
							quote_identifier(get_attname(t->relid, t->other, false))));
	/* no rows: the expression does not matter, and its columns may be renamed */
	if (t->type)
		rm_twin_alter(&twin, psprintf("ALTER COLUMN %s TYPE %s USING (NULL::%s)",
									  quote_identifier(column), t->type, t->type));
	rm_execute(psprintf("ALTER TABLE %s RENAME COLUMN %s TO %s", twin.sql,
						quote_identifier(column), quote_identifier(build_column)));
	return twin.relid;
}

static void
ask_twin(void *arg)
{
	Twin	   *t = arg;
	const RmMigration *m = t->m;
	const char *build_column = t->new_side ? m->new_column : m->old_column;
	Oid			types[] = {OIDOID, INT2OID, INT2OID, OIDOID, INT2OID, TEXTOID, TEXTOID, TEXTOID};
	Datum		v[8];
	Oid			twin = make_twin(t, build_column);

	v[0] = ObjectIdGetDatum(t->relid);
	v[1] = Int16GetDatum(t->attnum);
	v[2] = Int16GetDatum(t->other);
	v[3] = ObjectIdGetDatum(twin);
	v[4] = Int16GetDatum(get_attnum(twin, build_column));
	v[5] = CStringGetTextDatum(build_column);
	v[6] = CStringGetTextDatum(m->column);
	v[7] = CStringGetTextDatum(rm_built_prefix(m, t->new_side));
	rm_catalog_query("SELECT * FROM risky_migrations.dependents($1, $2, $3, $4, $5, $6, $7, $8)",
					 8, types, v);
	t->list = read_result(t->cxt);
}

/* what hangs on the column of one member */
static List *
derive_member(Twin *twin)
{
	ErrorData  *error = rm_rehearse(ask_twin, twin, CurrentMemoryContext);

	if (error)
	{
		if (error->detail == NULL)
			error->detail = psprintf("The change was tried on an empty copy of %s; ALTER TABLE would refuse it too.",
									 rm_relation_sql(twin->relid));
		if (error->hint == NULL)
			error->hint = "Drop or change what is in the way first, such as a constraint that makes no sense for the new type. A default can be given in the new type beforehand: ALTER COLUMN ... SET DEFAULT value::newtype.";
		ReThrowError(error);
	}
	return twin->list;
}

/*
 * What lists of things, from the root downwards, make together: in the order in
 * which they come into force, by kind, the root's first.  But foreign keys from the
 * leaves to the root, for what is proven in a leaf becomes the root's; and so the
 * CHECKs of a parent and its children, where one that a child has defined too is to be
 * there when it inherits the same.
 */
static List *
in_order(const RmMigration *m, List *things, MemoryContext cxt)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(cxt);
	List	   *result = NIL;
	int			n = list_length(things);
	int			ord = 0;
	ListCell   *lc;

	for (int kind = 0; kind < lengthof(kinds); kind++)
	{
		bool		upwards = strcmp(kinds[kind], "foreign key") == 0 ||
			(strcmp(kinds[kind], "check constraint") == 0 && !rm_is_parted(m));

		for (int i = 0; i < n; i++)
			foreach(lc, list_nth(things, upwards ? n - 1 - i : i))
				if (is_kind(lfirst(lc), kinds[kind]))
					result = lappend(result, lfirst(lc));
	}
	foreach(lc, result)
		((RmDependent *) lfirst(lc))->ord = ++ord;
	MemoryContextSwitchTo(oldcxt);
	return result;
}

/*
 * The table and all below it, each with a lock that keeps others from dropping it:
 * one that has come since the caller locked them too.  55P03 where it is just being
 * dropped.
 */
static List *
locked_members(const RmMigration *m)
{
	List	   *members = rm_tree(m->relid);
	ListCell   *lc;

	foreach(lc, members)
		if (!ConditionalLockRelationOid(lfirst_oid(lc), AccessShareLock) ||
			!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(lfirst_oid(lc))))
			rm_refuse_just_changed(m);
	return members;
}

/* what locked_members() has locked: nobody is to wait for what comes after the planning */
static void
unlock_members(List *members)
{
	ListCell   *lc;

	foreach(lc, members)
		UnlockRelationOid(lfirst_oid(lc), AccessShareLock);
}

/*
 * What hangs on the migration's column, with the commands for the new column
 * (new_side) or, for the way back, for the old one.  The caller holds locks
 * on the table and its partitions that keep others from dropping them.  Errors
 * are PostgreSQL's own where it cannot do the ALTER.  Nothing remains of the twins.
 */
List *
rm_dependents_derive(const RmMigration *m, bool new_side, MemoryContext cxt)
{
	List	   *things = NIL;
	List	   *members = locked_members(m);
	ListCell   *lc;

	foreach(lc, members)
	{
		Twin		twin = {.m = m,.relid = lfirst_oid(lc),.new_side = new_side,.cxt = cxt};

		CHECK_FOR_INTERRUPTS();
		twin.attnum = rm_leaf_attnum(m->relid, m->attnum, twin.relid);
		twin.other = rm_leaf_attnum(m->relid, m->new_attnum, twin.relid);
		twin.type = new_side ? m->new_type : NULL;
		things = lappend(things, derive_member(&twin));
	}
	unlock_members(members);
	return in_order(m, things, cxt);
}

/*
 * The list for the way back, of the time before the swap, with what hangs on the
 * new column of partitions that have come since.  Locks as above.
 */
List *
rm_dependents_add_members(const RmMigration *m, List *list, MemoryContext cxt)
{
	List	   *known = NIL;
	List	   *things = list_make1(list);
	List	   *members = locked_members(m);
	ListCell   *lc;

	foreach(lc, list)
		if (is_kind(lfirst(lc), "column"))
			known = lappend_oid(known, ((RmDependent *) lfirst(lc))->relid);
	foreach(lc, members)
	{
		Twin		twin = {.m = m,.relid = lfirst_oid(lc),.cxt = cxt};

		if (list_member_oid(known, twin.relid))
			continue;
		twin.attnum = rm_leaf_attnum(m->relid, m->new_attnum, twin.relid);
		twin.other = rm_leaf_attnum(m->relid, m->attnum, twin.relid);
		twin.type = m->old_type;
		things = lappend(things, derive_member(&twin));
	}
	unlock_members(members);
	return list_length(things) == 1 ? list : in_order(m, things, cxt);
}

/*-------------------------------------------------------------------------
 * Their rows
 *-------------------------------------------------------------------------
 */

static Datum
text_or_null(const char *s, char *null)
{
	*null = s ? ' ' : 'n';
	return s ? CStringGetTextDatum(s) : (Datum) 0;
}

/* replaces the rows of that side */
void
rm_dependents_save(const RmMigration *m, bool new_side, List *list)
{
	Oid			types[] = {INT8OID, TEXTOID, INT4OID, TEXTOID, TEXTOID, OIDOID, OIDOID,
	TEXTOID, TEXTOID, BOOLOID, TEXTOID, TEXTARRAYOID, TEXTOID, TEXTOID};
	Datum		v[lengthof(types)];
	char		n[lengthof(types)];
	ListCell   *lc;

	v[0] = Int64GetDatum(m->id);
	v[1] = CStringGetTextDatum(new_side ? "new" : "old");
	rm_state_execute("DELETE FROM risky_migrations.dependent WHERE migration_id = $1 AND side = $2",
					 2, types, v, NULL);
	foreach(lc, list)
	{
		RmDependent *d = lfirst(lc);

		memset(n, ' ', sizeof(n));
		v[2] = Int32GetDatum(d->ord);
		v[3] = CStringGetTextDatum(d->kind);
		v[4] = CStringGetTextDatum(d->name);
		v[5] = ObjectIdGetDatum(d->relid);
		v[6] = ObjectIdGetDatum(d->peer);
		n[6] = OidIsValid(d->peer) ? ' ' : 'n';
		v[7] = text_or_null(d->build_name, &n[7]);
		v[8] = text_or_null(d->build_sql, &n[8]);
		v[9] = BoolGetDatum(d->by_worker);
		v[10] = text_or_null(d->validate_sql, &n[10]);
		v[11] = rm_settings_array(d->take_sql);
		v[12] = text_or_null(d->drop_sql, &n[12]);
		v[13] = text_or_null(d->make_sql, &n[13]);
		rm_state_execute("INSERT INTO risky_migrations.dependent (migration_id, side, ord, kind,"
						 " name, relid, peer, build_name, build_sql, by_worker,"
						 " validate_sql, take_sql, drop_sql, make_sql)"
						 " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
						 lengthof(types), types, v, n);
	}
}

List *
rm_dependents_load(const RmMigration *m, bool new_side, MemoryContext cxt)
{
	Oid			types[] = {INT8OID, TEXTOID};
	Datum		v[] = {Int64GetDatum(m->id), CStringGetTextDatum(new_side ? "new" : "old")};

	rm_state_execute("SELECT ord::bigint, kind, name, relid, peer, build_name, build_sql,"
					 " by_worker, validate_sql, make_sql, take_sql, drop_sql"
					 " FROM risky_migrations.dependent"
					 " WHERE migration_id = $1 AND side = $2 ORDER BY ord",
					 2, types, v, NULL);
	return read_result(cxt);
}

static bool
same_text(const char *a, const char *b)
{
	return a == NULL || b == NULL ? a == b : strcmp(a, b) == 0;
}

/*
 * The list without those whose definition was another one before: under their
 * names something else may have been built.
 */
List *
rm_dependents_unchanged(List *before, List *now)
{
	List	   *result = NIL;
	ListCell   *ln;
	ListCell   *lb;

	foreach(ln, now)
	{
		RmDependent *d = lfirst(ln);
		bool		changed = false;

		foreach(lb, before)
		{
			RmDependent *b = lfirst(lb);

			if (d->build_name && same_text(d->build_name, b->build_name) &&
				!same_text(d->build_sql, b->build_sql))
				changed = true;
		}
		if (!changed)
			result = lappend(result, d);
	}
	return result;
}

/* are these the same things with the same definitions? */
bool
rm_dependents_equal(List *a, List *b)
{
	ListCell   *la;
	ListCell   *lb;

	if (list_length(a) != list_length(b))
		return false;
	forboth(la, a, lb, b)
	{
		RmDependent *x = lfirst(la);
		RmDependent *y = lfirst(lb);
		ListCell   *lx;
		ListCell   *ly;

		if (x->relid != y->relid ||
			!same_text(x->name, y->name) || !same_text(x->kind, y->kind) ||
			!same_text(x->build_sql, y->build_sql) ||
			!same_text(x->make_sql, y->make_sql) ||
			!same_text(x->validate_sql, y->validate_sql) ||
			list_length(x->take_sql) != list_length(y->take_sql))
			return false;
		forboth(lx, x->take_sql, ly, y->take_sql)
			if (strcmp(lfirst(lx), lfirst(ly)) != 0)
				return false;
	}
	return true;
}

/*-------------------------------------------------------------------------
 * What is there
 *-------------------------------------------------------------------------
 */

/*
 * Is it there under the name in which it waits?  *invalid: an index that a
 * failed build has left; *unvalidated: a constraint still to be validated.
 */
bool
rm_dependent_is_built(const RmMigration *m, const RmDependent *d, bool *invalid,
					  bool *unvalidated)
{
	Oid			nspid = get_rel_namespace(d->relid);
	HeapTuple	tup;
	Oid			oid;

	*invalid = *unvalidated = false;
	if (d->by_worker)
	{
		oid = get_relname_relid(d->build_name, nspid);
		tup = SearchSysCache1(INDEXRELID, ObjectIdGetDatum(oid));
		if (!HeapTupleIsValid(tup))
			return false;
		*invalid = !((Form_pg_index) GETSTRUCT(tup))->indisvalid;
		ReleaseSysCache(tup);
		return !*invalid;
	}
	if (strcmp(d->kind, "statistics") == 0)
	{
		Oid			types[] = {OIDOID, TEXTOID};
		Datum		v[] = {ObjectIdGetDatum(d->relid), CStringGetTextDatum(d->build_name)};

		rm_catalog_query("SELECT FROM pg_catalog.pg_statistic_ext"
						 " WHERE stxrelid = $1 AND stxname = $2", 2, types, v);
		return SPI_processed > 0;
	}
	oid = get_relation_constraint_oid(d->relid, d->build_name, true);
	tup = SearchSysCache1(CONSTROID, ObjectIdGetDatum(oid));
	if (!HeapTupleIsValid(tup))
		return false;
	*unvalidated = d->validate_sql && !((Form_pg_constraint) GETSTRUCT(tup))->convalidated;
	ReleaseSysCache(tup);
	return !*unvalidated;
}

/*
 * Commands that drop what bears one of our names on that side and is not
 * wanted: all of it (wanted NIL), or what earlier plans have left.
 */
List *
rm_dependents_leftovers(const RmMigration *m, bool new_side, List *wanted)
{
	Oid			types[] = {OIDOID, TEXTOID, TEXTARRAYOID};
	Datum		v[3];
	List	   *names = NIL;
	List	   *commands = NIL;
	ListCell   *lc;

	foreach(lc, wanted)
		if (((RmDependent *) lfirst(lc))->build_name)
			names = lappend(names, ((RmDependent *) lfirst(lc))->build_name);
	v[0] = ObjectIdGetDatum(m->relid);
	v[1] = CStringGetTextDatum(rm_built_prefix(m, new_side));
	v[2] = rm_settings_array(names);
	rm_catalog_query("SELECT * FROM risky_migrations.leftovers($1, $2, $3)", 3, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
		commands = lappend(commands, rm_result_text(i, 1));
	return commands;
}

/* commands that drop the copies of materialized views, which are leftovers too */
List *
rm_dependents_copies(const RmMigration *m, bool new_side)
{
	Oid			types[] = {OIDOID, TEXTOID};
	Datum		v[] = {ObjectIdGetDatum(m->relid), CStringGetTextDatum(rm_built_prefix(m, new_side))};
	List	   *commands = NIL;

	rm_catalog_query("SELECT drop_sql FROM risky_migrations.copies_there($1, $2) ORDER BY ord", 2, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
		commands = lappend(commands, rm_result_text(i, 1));
	return commands;
}

/*
 * OIDs of the relations whose definition changes when these things come into
 * force: the table and all below it first, then those at the other end of
 * foreign keys.
 */
List *
rm_dependents_relations(const RmMigration *m, List *list)
{
	List	   *members = rm_tree(m->relid);
	List	   *peers = NIL;
	ListCell   *lc;

	foreach(lc, list)
	{
		RmDependent *d = lfirst(lc);

		peers = list_append_unique_oid(peers, d->relid);
		if (OidIsValid(d->peer))
			peers = list_concat_unique_oid(peers, rm_members(d->peer));
	}
	list_sort(peers, list_oid_cmp);
	return list_concat_unique_oid(members, peers);
}

/* see risky_migrations.catalog_fingerprint() */
char *
rm_catalog_fingerprint(Oid relid, MemoryContext cxt)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(relid)};
	char	   *result;
	MemoryContext oldcxt;

	rm_catalog_query("SELECT risky_migrations.catalog_fingerprint($1)", 1, types, v);
	oldcxt = MemoryContextSwitchTo(cxt);
	result = rm_result_text(0, 1);
	MemoryContextSwitchTo(oldcxt);
	return result;
}

/*
 * Raises what the query before has found to be in the way of a method: rows of
 * kind, name, reason, hint; each hint is given once (0A000).  columns: on what it
 * hangs, see rm_columns_text().  Nothing if it has found nothing.
 */
void
rm_refuse_obstacles(const char *method, Oid relid, const char *columns)
{
	StringInfoData detail;
	StringInfoData hint;

	if (SPI_processed == 0)
		return;
	initStringInfo(&detail);
	initStringInfo(&hint);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		char	   *text = rm_result_text(i, 4);

		appendStringInfo(&detail, "%s%s %s: %s.", i ? "\n" : "", rm_result_text(i, 1),
						 rm_result_text(i, 2), rm_result_text(i, 3));
		if (strstr(hint.data, text) == NULL)
			appendStringInfo(&hint, "%s%s", hint.len ? "\n" : "", text);
	}
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("%s cannot carry over what hangs on %s of %s", method, columns,
					rm_relation_sql(relid)),
			 errdetail_internal("%s", detail.data),
			 errhint("%s", hint.data)));
}

/*
 * Refuses what cannot be carried over, all of it in one error (0A000), before
 * anything is changed; publications only if asked, and materialized views unless
 * they may be made again.
 */
void
rm_dependents_refuse(Oid relid, AttrNumber attnum, Oid new_type, bool publications)
{
	Oid			types[] = {OIDOID, INT2OID, BOOLOID, BOOLOID, OIDOID};
	Datum		v[] = {ObjectIdGetDatum(relid), Int16GetDatum(attnum),
	BoolGetDatum(!publications), BoolGetDatum(rm_recreate_matviews), ObjectIdGetDatum(new_type)};

	rm_catalog_query("SELECT kind, name, reason, hint FROM risky_migrations.column_obstacles($1, $2)"
					 " WHERE NOT CASE kind WHEN 'publication' THEN $3 WHEN 'materialized view' THEN $4 ELSE false END"
					 " UNION ALL SELECT kind, name, reason, hint FROM risky_migrations.column_coercions($1, $2, $5)",
					 5, types, v);
	rm_refuse_obstacles("three_step", relid,
						psprintf("column \"%s\"", get_attname(relid, attnum, false)));
}

/*
 * Gives the column's NOT NULL the name that it had there, where it is a constraint
 * (from 18 on).  ALTER TABLE gives that of the parent to all partitions, and
 * renames it only where all have the same.  The caller holds ACCESS EXCLUSIVE.
 */
void
rm_name_not_null(const RmDependent *d, AttrNumber attnum)
{
	Oid			types[] = {OIDOID, INT2OID, TEXTOID};
	Datum		v[] = {ObjectIdGetDatum(d->relid), Int16GetDatum(attnum), CStringGetTextDatum(d->name)};

	rm_catalog_query("SELECT oid FROM pg_catalog.pg_constraint WHERE conrelid = $1 AND contype = 'n'"
					 " AND conkey = ARRAY[$2] AND conname <> $3", 3, types, v);
	if (SPI_processed == 0)
		return;
	RenameConstraintById(DatumGetObjectId(rm_result_datum(0, 1)), d->name);
	CommandCounterIncrement();
}

/*-------------------------------------------------------------------------
 * What ALTER TABLE cannot move to another column
 *-------------------------------------------------------------------------
 */

/* exchanges attislocal of two columns */
static void
swap_islocal(Oid relid, AttrNumber a, AttrNumber b)
{
	Relation	rel = table_open(AttributeRelationId, RowExclusiveLock);
	HeapTuple	tups[2] = {SearchSysCacheCopyAttNum(relid, a), SearchSysCacheCopyAttNum(relid, b)};
	bool		first;

	if (!HeapTupleIsValid(tups[0]) || !HeapTupleIsValid(tups[1]))
		elog(ERROR, "cache lookup failed for attribute %d or %d of relation %u", a, b, relid);
	first = ((Form_pg_attribute) GETSTRUCT(tups[0]))->attislocal;
	((Form_pg_attribute) GETSTRUCT(tups[0]))->attislocal =
		((Form_pg_attribute) GETSTRUCT(tups[1]))->attislocal;
	((Form_pg_attribute) GETSTRUCT(tups[1]))->attislocal = first;
	for (int i = 0; i < lengthof(tups); i++)
		CatalogTupleUpdate(rel, &tups[i]->t_self, tups[i]);
	table_close(rel, RowExclusiveLock);
}

/*
 * In children of the table the two columns change places also in whether the child
 * has defined them itself, besides inheriting them: whether it keeps the column when
 * it is taken away tells pg_dump to write it down.  The caller holds ACCESS EXCLUSIVE.
 */
void
rm_swap_definers(const RmMigration *m)
{
	ListCell   *lc;

	if (rm_is_parted(m))
		return;
	foreach(lc, rm_tree(m->relid))
		if (lfirst_oid(lc) != m->relid)
			swap_islocal(lfirst_oid(lc),
						 rm_leaf_attnum(m->relid, m->attnum, lfirst_oid(lc)),
						 rm_leaf_attnum(m->relid, m->new_attnum, lfirst_oid(lc)));
	CommandCounterIncrement();
}

/* writes attidentity of one column; returns what it was */
static char
set_identity(Oid relid, AttrNumber attnum, char identity)
{
	Relation	rel = table_open(AttributeRelationId, RowExclusiveLock);
	HeapTuple	tup = SearchSysCacheCopyAttNum(relid, attnum);
	Form_pg_attribute att;
	char		before;

	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for attribute %d of relation %u", attnum, relid);
	att = (Form_pg_attribute) GETSTRUCT(tup);
	before = att->attidentity;
	att->attidentity = identity;
	CatalogTupleUpdate(rel, &tup->t_self, tup);
	heap_freetuple(tup);
	table_close(rel, RowExclusiveLock);
	return before;
}

/*
 * Makes another column the identity column.  ALTER TABLE can only drop an
 * identity, with its sequence, and add another one: the sequence would lose its
 * OID, its grants, and the values that sessions have cached.  So the mark and
 * the dependency are moved.  The caller holds ACCESS EXCLUSIVE.
 */
void
rm_move_identity(Oid relid, AttrNumber from, AttrNumber to, Oid sequence)
{
	ObjectAddress seq;
	ObjectAddress column;
	ListCell   *lc;

	/* partitions may have their parent's, without a sequence */
	foreach(lc, RM_IDENTITY_IS_INHERITED ? rm_members(relid) : list_make1_oid(relid))
	{
		Oid			member = lfirst_oid(lc);

		(void) set_identity(member, rm_leaf_attnum(relid, to, member),
							set_identity(member, rm_leaf_attnum(relid, from, member), '\0'));
	}
	deleteDependencyRecordsForClass(RelationRelationId, sequence,
									RelationRelationId, DEPENDENCY_INTERNAL);
	ObjectAddressSet(seq, RelationRelationId, sequence);
	ObjectAddressSubSet(column, RelationRelationId, relid, to);
	recordDependencyOn(&seq, &column, DEPENDENCY_INTERNAL);
	CommandCounterIncrement();
}

/*
 * A foreign key that refers to a partitioned table has a part for each partition.
 * Before PostgreSQL 18 VALIDATE CONSTRAINT proves the whole and leaves these marked as
 * NOT VALID for good: by itself none would hold, for it knows one partition only.  ALTER
 * TABLE leaves them valid.  The caller holds a lock on that table.  Needs SPI.
 */
void
rm_mark_parts_proven(Oid referenced)
{
	Oid			types[] = {OIDOID};
	Datum		v[] = {ObjectIdGetDatum(referenced)};
	Relation	rel = table_open(ConstraintRelationId, RowExclusiveLock);
	List	   *parts;
	ListCell   *lc;

	do							/* a part may have parts of its own */
	{
		parts = NIL;
		rm_catalog_query("SELECT k.oid FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_constraint p"
						 " ON p.oid OPERATOR(pg_catalog.=) k.conparentid"
						 " AND p.conrelid OPERATOR(pg_catalog.=) k.conrelid"
						 " WHERE k.contype OPERATOR(pg_catalog.=) 'f' AND p.convalidated AND NOT k.convalidated"
						 " AND k.confrelid OPERATOR(pg_catalog.=) ANY"
						 " (ARRAY(SELECT t.relid FROM pg_catalog.pg_partition_tree($1) t))",
						 lengthof(types), types, v);
		for (uint64 i = 0; i < SPI_processed; i++)
			parts = lappend_oid(parts, DatumGetObjectId(rm_result_datum(i, 1)));
		foreach(lc, parts)
		{
			HeapTuple	tup = SearchSysCacheCopy1(CONSTROID, ObjectIdGetDatum(lfirst_oid(lc)));

			if (!HeapTupleIsValid(tup))
				elog(ERROR, "cache lookup failed for constraint %u", lfirst_oid(lc));
			((Form_pg_constraint) GETSTRUCT(tup))->convalidated = true;
			CatalogTupleUpdate(rel, &tup->t_self, tup);
			heap_freetuple(tup);
		}
		CommandCounterIncrement();
	} while (parts != NIL);
	table_close(rel, RowExclusiveLock);
}
