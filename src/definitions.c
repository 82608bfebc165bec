/*-------------------------------------------------------------------------
 *
 * definitions.c
 *	  Views, rules, policies, triggers and publications on a column: dropped, and
 *	  made again.
 *
 * ALTER TABLE refuses to change the type of a column that they read, and when
 * another column takes its name they would stay with the old one.  So each is
 * read as the statements that make it (risky_migrations.column_objects(), in the
 * install script), dropped, and made again in the same transaction.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "conversion.h"
#include "definitions.h"
#include "executor/spi.h"
#include "matviews.h"
#include "state.h"

/* views, rules, policies, triggers, publications: dropped before, made again after it */
typedef struct Definition
{
	Oid			relid;			/* of a view, else 0 */
	char	   *drop_sql;
	List	   *make_sql;
} Definition;

/* what has to go before these columns can change, in the order in which it goes */
List *
rm_definitions_on(const RmMigration *m, List *attnums)
{
	Oid			types[] = {OIDOID, INT2ARRAYOID};
	Datum		v[] = {ObjectIdGetDatum(m->relid), rm_attnum_array(attnums)};
	List	   *list = NIL;

	rm_catalog_query("SELECT drop_sql, make_sql, coalesce(relation, 0)"
					 " FROM risky_migrations.column_objects($1, $2) ORDER BY ord",
					 2, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		Definition *d = palloc(sizeof(Definition));

		d->drop_sql = rm_result_text(i, 1);
		d->make_sql = rm_settings_list(rm_result_datum(i, 2));
		d->relid = DatumGetObjectId(rm_result_datum(i, 3));
		list = lappend(list, d);
	}
	return list;
}

/* relations besides the table that the exchange changes, by OID */
List *
rm_relations_of_definitions(const RmMigration *m, List *attnums)
{
	Oid			types[] = {OIDOID, INT2ARRAYOID};
	Datum		v[] = {ObjectIdGetDatum(m->relid), rm_attnum_array(attnums)};
	List	   *list = NIL;

	rm_catalog_query("SELECT r FROM risky_migrations.column_relations($1, $2) r",
					 2, types, v);
	for (uint64 i = 0; i < SPI_processed; i++)
		list = lappend_oid(list, DatumGetObjectId(rm_result_datum(i, 1)));
	return list;
}

void
rm_definitions_drop(List *definitions)
{
	ListCell   *lc;

	foreach(lc, definitions)
		rm_execute(((Definition *) lfirst(lc))->drop_sql);
}

/*
 * The other way round.  A view of which there is a copy among these (of RmCopy) is
 * not made: the copy takes its place.
 */
void
rm_definitions_make(List *definitions, List *copies)
{
	ListCell   *cmd;

	for (int i = list_length(definitions) - 1; i >= 0; i--)
	{
		Definition *d = list_nth(definitions, i);
		const RmCopy *copy = rm_copy_of(copies, d->relid);

		foreach(cmd, copy ? copy->take_sql : d->make_sql)
			rm_execute(lfirst(cmd));
	}
}

/* 55P03: they are not what they were before the locks were there; the next try reads them again */
void
rm_refuse_just_changed(const RmMigration *m)
{
	ereport(ERROR,
			(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
			 errmsg("what hangs on the column of %s has just changed", m->relation)));
}
