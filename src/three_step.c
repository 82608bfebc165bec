/*-------------------------------------------------------------------------
 *
 * three_step.c
 *	  The method three_step: a shadow column is added, filled, enforced.
 *
 *	add_column			ACCESS EXCLUSIVE for milliseconds: column and sync
 *						trigger appear in one transaction.  ALTER TABLE waits
 *						for all who have written the table, so whoever writes
 *						it later fires the trigger.
 *	backfill			see backfill.c
 *	enforce_not_null	verifies every row, beside readers and writers;
 *						then ACCESS EXCLUSIVE for milliseconds to add CHECK
 *						(... IS NOT NULL) NOT VALID; VALIDATE CONSTRAINT scans
 *						beside readers and writers; then ACCESS EXCLUSIVE for
 *						milliseconds again: SET NOT NULL believes the proven
 *						constraint and does not scan, and the constraint goes.
 *
 * Transactions that were open before a step and end after it: one that has
 * written the table makes the ALTER wait (bounded).  One that has only read
 * it keeps ACCESS SHARE and does the same.  One that has not touched it yet,
 * under any isolation level, sees the new catalogs when it locks the table,
 * and its writes fire the trigger; a REPEATABLE READ one that updates a row
 * which the backfill has changed since its snapshot gets 40001, as after any
 * concurrent update.
 *
 * What a crash leaves between two commits: a phase in the state row, at which
 * the step goes on.  Verification begins again, since its result is worth
 * only as much as the trigger was watched.
 *
 * Easy to get wrong: SET NOT NULL scans the table under ACCESS EXCLUSIVE
 * unless the CHECK is there and valid, so that is looked up in the same
 * transaction, after the lock; and once the CHECK exists the trigger must
 * raise conversion errors rather than record them (m->enforced).
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/catalog.h"
#include "catalog/dependency.h"
#include "catalog/pg_am.h"
#include "catalog/pg_class.h"
#include "catalog/pg_constraint.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/defrem.h"
#include "commands/trigger.h"
#include "compat.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/nodes.h"
#include "parser/parse_func.h"
#include "rewrite/prs2lock.h"
#include "risky_migrations.h"
#include "rows.h"
#include "state.h"
#include "steps.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

/* pages that one transaction of the verification looks at, at most */
#define VERIFY_PAGES 4096
/* and for how long, in milliseconds */
#define VERIFY_TIME 200

/* phases of enforce_not_null, in the state row */
enum
{
	ENFORCE_BEGIN,				/* fix what is to be verified */
	ENFORCE_VERIFY,				/* every row, in ranges of pages */
	ENFORCE_ADD_CHECK,			/* CHECK ... NOT VALID, unless a row is wrong */
	ENFORCE_VALIDATE,
	ENFORCE_SET_NOT_NULL
};

static const char *
column_sql(const RmMigration *m, AttrNumber attnum)
{
	return quote_identifier(get_attname(m->relid, attnum, false));
}

/* created_at -> created_at_new, within the length of a name */
char *
rm_shadow_column_name(const char *column)
{
	return makeObjectName(column, NULL, "new");
}

/* created_at -> created_at_old, likewise */
char *
rm_old_column_name(const char *column)
{
	return makeObjectName(column, NULL, "old");
}

/*-------------------------------------------------------------------------
 * What is refused
 *-------------------------------------------------------------------------
 */

static void
refuse(Relation rel, const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("three_step cannot change table \"%s\"",
					RelationGetRelationName(rel)),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

/* triggers that would see or spoil what the sync trigger does */
static void
refuse_triggers(Relation rel)
{
	TriggerDesc *desc = rel->trigdesc;

	for (int i = 0; desc && i < desc->numtriggers; i++)
	{
		Trigger    *t = &desc->triggers[i];

		if (TRIGGER_FOR_BEFORE(t->tgtype) && TRIGGER_FOR_ROW(t->tgtype) &&
			(TRIGGER_FOR_INSERT(t->tgtype) || TRIGGER_FOR_UPDATE(t->tgtype)) &&
			strncmp(t->tgname, "~rm_sync_", 9) != 0 &&
			strcmp(t->tgname, "~rm_sync_") > 0)
			refuse(rel, psprintf("The trigger \"%s\" would fire after the sync trigger and could change the row again.",
								 t->tgname),
				   "Give it a name that sorts before \"~\".");
	}
}

/*
 * Refuses every table and column that three_step cannot change, before
 * anything is changed.  The caller holds a lock on rel.
 */
void
rm_three_step_refuse(Relation rel, const RmConversionDef *def,
					 const char *new_column)
{
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel), def->attnum - 1);
	Oid			state_nspid = get_rel_namespace(rm_state_relid("migration", false));

	if (rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE || rel->rd_rel->relispartition)
		refuse(rel, "It is partitioned or a partition.",
			   "Partitioned tables are not supported yet.");
	if (rel->rd_rel->relkind != RELKIND_RELATION)
		refuse(rel, "It is not an ordinary table.", "Name an ordinary table.");
	if (IsCatalogRelation(rel) || RelationGetNamespace(rel) == state_nspid)
		refuse(rel, "It is a system catalog, or belongs to this extension.",
			   "Name a table of your own.");
	if (rel->rd_rel->relam != HEAP_TABLE_AM_OID)
		refuse(rel, "Its table access method is not heap.",
			   "Only tables of the access method heap can be filled in place.");
	if (RelationUsesLocalBuffers(rel))
		refuse(rel, "It is a temporary table.",
			   "Nobody else can be waiting for it: use ALTER TABLE.");
	if (rel->rd_rel->relhassubclass || has_superclass(RelationGetRelid(rel)))
		refuse(rel, "It has parents or children by inheritance.",
			   "Inheritance is not supported yet.");
	if (att->attgenerated)
		refuse(rel, psprintf("The column \"%s\" is generated.", NameStr(att->attname)),
			   "Change the columns that it is generated from.");
	if (DomainHasConstraints(def->type))
		refuse(rel, psprintf("The type %s is a domain with constraints, and adding a column of it would rewrite the table.",
							 format_type_be(def->type)),
			   "Use the domain's base type, with the domain's CHECK on the column added NOT VALID and validated; or ALTER TABLE where nobody is waiting.");
	CheckCmdReplicaIdentity(rel, CMD_UPDATE);
	if (get_attnum(RelationGetRelid(rel), new_column) != InvalidAttrNumber)
		ereport(ERROR,
				(errcode(ERRCODE_DUPLICATE_COLUMN),
				 errmsg("column \"%s\" of relation \"%s\" already exists", new_column,
						RelationGetRelationName(rel)),
				 errdetail("It is the name that the shadow column would get."),
				 errhint("Rename that column first.")));
	if (get_attnum(RelationGetRelid(rel), rm_old_column_name(NameStr(att->attname))) != InvalidAttrNumber)
		ereport(ERROR,
				(errcode(ERRCODE_DUPLICATE_COLUMN),
				 errmsg("column \"%s\" of relation \"%s\" already exists",
						rm_old_column_name(NameStr(att->attname)),
						RelationGetRelationName(rel)),
				 errdetail("It is the name that the column would get by the swap."),
				 errhint("Rename that column first.")));
	if (!rm_may_create_in(RelationGetNamespace(rel), GetUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for schema %s",
						get_namespace_name(RelationGetNamespace(rel))),
				 errdetail("Indexes on the new column are made in the schema of the table."),
				 errhint("GRANT CREATE on the schema to the role that runs the migration.")));
	refuse_triggers(rel);
}

/*-------------------------------------------------------------------------
 * add_column
 *-------------------------------------------------------------------------
 */

/* the trigger's OID; it has just been made */
static Oid
trigger_oid(const RmMigration *m)
{
	return get_trigger_oid(m->relid, rm_trigger_name(m->id), false);
}

/* the function that sync triggers call */
static Oid
sync_function(void)
{
	return LookupFuncName(list_make2(makeString(RM_SCHEMA), makeString("sync")),
						  0, NULL, false);
}

/*
 * The shadow column is not the extension's any more: DROP EXTENSION leaves it.
 * To be called in the transaction that makes it the table's own.  (Other
 * shadow columns of the table are let go too; they keep their triggers.)
 */
void
rm_release_shadow_column(const RmMigration *m)
{
	(void) deleteDependencyRecordsForSpecific(RelationRelationId, m->relid,
											  DEPENDENCY_NORMAL,
											  ProcedureRelationId, sync_function());
}

/*
 * The shadow column depends on the trigger's function: DROP EXTENSION ...
 * CASCADE, which takes the trigger, takes the column too.  Left behind as NOT
 * NULL, without its trigger, it would make every INSERT fail.
 */
void
rm_bind_shadow_column(const RmMigration *m)
{
	ObjectAddress column;
	ObjectAddress function;

	ObjectAddressSubSet(column, RelationRelationId, m->relid, m->new_attnum);
	ObjectAddressSet(function, ProcedureRelationId, sync_function());
	recordDependencyOn(&column, &function, DEPENDENCY_NORMAL);
}

/*
 * The trigger depends on the shadow column and on all that the expression
 * uses, so that nobody drops or changes these without being told.
 */
static void
record_dependencies(const RmMigration *m)
{
	ObjectAddress trigger;
	ObjectAddress column;

	ObjectAddressSet(trigger, TriggerRelationId, trigger_oid(m));
	ObjectAddressSubSet(column, RelationRelationId, m->relid, m->new_attnum);
	recordDependencyOn(&trigger, &column, DEPENDENCY_NORMAL);
	rm_bind_shadow_column(m);
	if (m->server_version == PG_VERSION_NUM / 10000)
		recordDependencyOnSingleRelExpr(&trigger, stringToNode(m->tree), m->relid,
										DEPENDENCY_NORMAL, DEPENDENCY_NORMAL, false);
}

/* shadow column and sync trigger, in this one transaction */
static void
make_column_and_trigger(RmRun *run)
{
	RmMigration *m = run->m;
	const char *rel_sql = rm_relation_sql(m->relid);
	const char *trigger = quote_identifier(rm_trigger_name(m->id));
	Relation	rel;

	rm_execute(psprintf("ALTER TABLE ONLY %s ADD COLUMN %s %s", rel_sql,
						quote_identifier(m->new_column), m->new_type));
	m->new_attnum = get_attnum(m->relid, m->new_column);
	rm_execute(psprintf("CREATE TRIGGER %s BEFORE INSERT OR UPDATE ON %s"
						" FOR EACH ROW EXECUTE FUNCTION " RM_SCHEMA ".sync(%lld)",
						trigger, rel_sql, (long long) m->id));
	rm_execute(psprintf("ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %s", rel_sql,
						trigger));
	record_dependencies(m);
	CommandCounterIncrement();

	rel = table_open(m->relid, NoLock);
	rm_backfill_fix_end(m, rel);
	table_close(rel, NoLock);
	m->rows_done = 0;
}

/* both gone again; what somebody else has dropped already is no error */
static void
drop_column_and_trigger(RmRun *run)
{
	RmMigration *m = run->m;
	const char *rel_sql = rm_relation_sql(m->relid);
	HeapTuple	att;

	rm_execute(psprintf("DROP TRIGGER IF EXISTS %s ON %s",
						quote_identifier(rm_trigger_name(m->id)), rel_sql));
	att = SearchSysCacheAttNum(m->relid, m->new_attnum);	/* NULL if dropped */
	if (HeapTupleIsValid(att))
	{
		rm_execute(psprintf("ALTER TABLE ONLY %s DROP COLUMN %s", rel_sql,
							quote_identifier(NameStr(((Form_pg_attribute) GETSTRUCT(att))->attname))));
		ReleaseSysCache(att);
	}
	m->new_attnum = 0;
	m->enforced = false;
}

/* what earlier tries have written down about rows is of no use any more */
static void
forget_rows(RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("DELETE FROM risky_migrations.skipped_row WHERE migration_id = $1",
					 1, types, v, NULL);
	rm_state_execute("DELETE FROM risky_migrations.conversion_error WHERE migration_id = $1",
					 1, types, v, NULL);
}

/* what parse_reverse() is given, and its result */
typedef struct Reverse
{
	const RmMigration *m;
	MemoryContext cxt;
	char	   *tree;
} Reverse;

/*
 * Parses the expression for the way back.  It speaks of the new column by the
 * old one's name, so the columns are renamed for it; that is undone.
 */
static void
parse_reverse(void *arg)
{
	Reverse    *r = arg;
	const RmMigration *m = r->m;
	const char *rel_sql = rm_relation_sql(m->relid);
	Form_pg_attribute att;
	Relation	rel;
	char	   *tree;

	rm_execute(psprintf("ALTER TABLE ONLY %s RENAME COLUMN %s TO %s", rel_sql,
						quote_identifier(m->column), quote_identifier(m->old_column)));
	rm_execute(psprintf("ALTER TABLE ONLY %s RENAME COLUMN %s TO %s", rel_sql,
						quote_identifier(m->new_column), quote_identifier(m->column)));
	CommandCounterIncrement();
	rel = table_open(m->relid, NoLock);
	att = TupleDescAttr(RelationGetDescr(rel), m->attnum - 1);
	tree = rm_conversion_parse_reverse(rel, m->column, m->reverse_expr,
									   att->atttypid, att->atttypmod);
	table_close(rel, NoLock);
	if (tree)
		r->tree = MemoryContextStrdup(r->cxt, tree);
}

static RmStepResult
add_column_apply(RmRun *run)
{
	RmMigration *m = run->m;
	Relation	rel;
	RmConversionDef def = {.attnum = m->attnum,.type = m->new_type_id};
	Reverse		reverse = {.m = m,.cxt = CurrentMemoryContext};
	ErrorData  *error;
	BlockNumber pages;
	double		tuples;
	double		allvisfrac;

	rm_lock_relation(&run->locks, m->relid, AccessExclusiveLock);
	rel = table_open(m->relid, NoLock);
	rm_check_ground(m, rel);
	rm_check_owner(m->relid, m->relation);
	rm_three_step_refuse(rel, &def, m->new_column);
	run->old_storage = rm_relation_storage(m->relid);
	table_relation_estimate_size(rel, NULL, &pages, &tuples, &allvisfrac);
	m->rows_estimated = (int64) tuples;
	table_close(rel, NoLock);

	make_column_and_trigger(run);
	error = rm_rehearse(parse_reverse, &reverse, CurrentMemoryContext);
	if (error)
		ReThrowError(error);
	m->reverse_tree = reverse.tree;
	rm_swap_rehearse(run);
	return RM_STEP_DONE;
}

static RmStepResult
add_column_revert(RmRun *run)
{
	rm_lock_relation(&run->locks, run->m->relid, AccessExclusiveLock);
	rm_check_owner(run->m->relid, run->m->relation);
	run->old_storage = rm_relation_storage(run->m->relid);
	drop_column_and_trigger(run);
	forget_rows(run->m);
	return RM_STEP_DONE;
}

/*
 * Back to the empty shadow column.  Dropping and adding it takes milliseconds
 * whatever the size; setting every row to NULL would be another backfill.
 */
RmStepResult
rm_backfill_revert(RmRun *run)
{
	rm_lock_relation(&run->locks, run->m->relid, AccessExclusiveLock);
	rm_check_owner(run->m->relid, run->m->relation);
	run->old_storage = rm_relation_storage(run->m->relid);
	drop_column_and_trigger(run);
	forget_rows(run->m);
	make_column_and_trigger(run);
	return RM_STEP_DONE;
}

const RmStep rm_step_add_column = {
	.name = "add_column",
	.apply = add_column_apply,
	.revert = add_column_revert,
};

/*-------------------------------------------------------------------------
 * enforce_not_null
 *-------------------------------------------------------------------------
 */

/* the verification; lives across transactions */
typedef struct Enforce
{
	int64		checked;		/* rows, committed */
	int64		failures;		/* rows that do not convert */
	int64		nulled;			/* the same, accepted as NULL */
	int64		mended;			/* rows that were not equal */
	bool		begun;			/* its first transaction has committed */
	bool		converting;
	bool		careful;
	bool		nullable;		/* the old column allows NULL */
	bool		validating;		/* VALIDATE CONSTRAINT is under way */
	bool		invalid;		/* ... and has found a row */
	int64		xact_checked;
	int64		xact_failures;
	int64		xact_nulled;
	int64		xact_mended;
} Enforce;

/* OID of our CHECK constraint if it is there; valid tells whether it is proven */
static Oid
find_check(const RmMigration *m, bool *valid)
{
	Oid			oid = get_relation_constraint_oid(m->relid, rm_check_name(m), true);
	HeapTuple	tup;

	*valid = false;
	if (!OidIsValid(oid))
		return InvalidOid;
	tup = SearchSysCache1(CONSTROID, ObjectIdGetDatum(oid));
	if (!HeapTupleIsValid(tup))
		return InvalidOid;
	*valid = ((Form_pg_constraint) GETSTRUCT(tup))->convalidated;
	ReleaseSysCache(tup);
	return oid;
}

static bool
attribute_not_null(Oid relid, AttrNumber attnum)
{
	HeapTuple	tup = SearchSysCache2(ATTNUM, ObjectIdGetDatum(relid),
									  Int16GetDatum(attnum));
	bool		result;

	if (!HeapTupleIsValid(tup))
		return false;
	result = ((Form_pg_attribute) GETSTRUCT(tup))->attnotnull;
	ReleaseSysCache(tup);
	return result;
}

/* the expression gives NULL in a row whose old column may not be NULL */
static void
refuse_null(RmRun *run, RmRows *rows)
{
	ErrorData	error = {0};

	error.sqlerrcode = ERRCODE_NOT_NULL_VIOLATION;
	error.message = "the expression gives NULL for this value";
	rm_row_record_failure(rows, &error);
	((Enforce *) run->work)->xact_failures++;
}

/* on_error => 'null', which a NOT NULL of the old column rules out */
static bool
accepts_null(const RmRun *run)
{
	return run->m->null_on_error && ((Enforce *) run->work)->nullable;
}

/* one row: is the new value equal to the expression's?  If not, mend it */
static void
verify_row(RmRun *run, RmRows *rows)
{
	Enforce    *e = run->work;
	Datum		value;
	Datum		present;
	bool		isnull;
	bool		present_isnull;
	ErrorData  *error;
	bool		converted;
	bool		hot;

	e->xact_checked++;
	e->converting = true;
	converted = rm_row_convert(rows, e->careful, &value, &isnull, &error);
	e->converting = false;
	if (!converted)
	{
		rm_row_record_failure(rows, error);
		if (!accepts_null(run))
		{
			e->xact_failures++;
			return;
		}
		e->xact_nulled++;
		value = (Datum) 0;
		isnull = true;
	}
	present = rm_row_target(rows, &present_isnull);
	if (isnull == present_isnull &&
		(isnull || datum_image_eq(value, present, rows->conv->typbyval,
								  rows->conv->typlen)))
	{
		if (isnull && !e->nullable)
			refuse_null(run, rows);
		return;
	}
	(void) rm_row_make(rows, value, isnull);
	switch (rm_row_store(rows, false, &hot))
	{
		case TM_Ok:
			e->xact_mended++;
			break;
		case TM_Updated:
		case TM_Deleted:
			break;				/* the trigger has converted its successor */
		default:
			/* never wait for a row while others are locked: again, later */
			ereport(ERROR,
					(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
					 errmsg("row %s of %s is locked by another transaction",
							rm_row_key(rows->rel, rows->slot), run->relation),
					 errdetail("It has to be mended, and is not waited for while others are locked."),
					 errhint("Call it again when that transaction has ended.")));
	}
}

/* a range of pages; moves next_block */
static void
verify_range(RmRun *run, Relation rel, BlockNumber end)
{
	RmMigration *m = run->m;
	RmRows	   *rows = rm_rows_open(m, rel, RM_ROWS_MANY);
	BlockNumber block = m->next_block;
	BlockNumber stop = Min((int64) end, m->next_block + VERIFY_PAGES);
	instr_time	started;
	Enforce    *e = run->work;

	INSTR_TIME_SET_CURRENT(started);
	while (block < stop)
	{
		OffsetNumber offsets[MaxHeapTuplesPerPage];
		Buffer		buf;
		int			n;
		int			dead;

		CHECK_FOR_INTERRUPTS();
		buf = ReadBuffer(rel, block++);
		n = rm_rows_on_page(rows, buf, false, offsets, &dead);
		for (int i = 0; i < n; i++)
		{
			rm_row_get(rows, buf, offsets[i]);
			verify_row(run, rows);
		}
		ReleaseBuffer(buf);
		/* a row that was mended is locked: commit soon */
		if (e->xact_mended > 0 || rm_elapsed_ms(started) > VERIFY_TIME)
			break;
	}
	m->next_block = block;
	rm_rows_close(rows);
}

static void
refuse_wrong_rows(RmRun *run)
{
	Enforce    *e = run->work;

	if (e->failures > 0)
		ereport(ERROR,
				(errcode(ERRCODE_NOT_NULL_VIOLATION),
				 errmsg_plural("%lld row of %s has no new value",
							   "%lld rows of %s have no new value",
							   (unsigned long) e->failures, (long long) e->failures,
							   run->relation),
				 errdetail("Column \"%s\" has values that do not convert; %lld rows were checked. Nothing has been enforced.",
						   run->m->column, (long long) e->checked),
				 errhint("SELECT * FROM rm_conversion_errors; mend these rows, they are converted as they are written, then call it again.")));
}

/* has a writer recorded a value that does not convert, since forget_rows()? */
static bool
failures_recorded(const RmMigration *m)
{
	Oid			types[] = {INT8OID};
	Datum		v[] = {Int64GetDatum(m->id)};

	rm_state_execute("SELECT 1 FROM risky_migrations.conversion_error"
					 " WHERE migration_id = $1 LIMIT 1", 1, types, v, NULL);
	return SPI_processed > 0;
}

/* from the commit on, all sessions' triggers raise or record what fails */
static void
set_enforced(RmMigration *m, bool enforced)
{
	m->enforced = enforced;
	CacheInvalidateRelcacheByRelid(m->relid);
}

/* the part without strong locks: every row equals the expression's value */
static RmStepResult
verify(RmRun *run, Relation rel)
{
	RmMigration *m = run->m;
	Enforce    *e = run->work;
	BlockNumber end;

	if (m->relfilenode != rel->rd_rel->relfilenode)
		m->phase = ENFORCE_BEGIN;	/* rewritten: pages have other numbers */
	if (m->phase == ENFORCE_BEGIN)
	{
		e->nullable = !attribute_not_null(m->relid, m->attnum);
		m->trigger_xmin = rm_trigger_xmin(m);
		forget_rows(m);
		rm_backfill_fix_end(m, rel);
		e->checked = e->failures = e->nulled = e->mended = 0;
		m->phase = ENFORCE_VERIFY;
	}
	end = Min(m->end_block, RelationGetNumberOfBlocks(rel));
	if (m->next_block < end)
		verify_range(run, rel, end);
	if (m->next_block >= end)
		m->phase = ENFORCE_ADD_CHECK;
	run->rows_changed += e->xact_mended;
	run->may_hold = m->phase == ENFORCE_VERIFY;
	run->progress.blocks_done = m->next_block;
	run->progress.blocks_total = m->end_block;
	run->progress.rows_done = e->checked + e->xact_checked;
	run->progress.rows_total = Max(m->rows_estimated, run->progress.rows_done);
	return RM_STEP_AGAIN;
}

static RmStepResult
enforce_apply(RmRun *run)
{
	RmMigration *m = run->m;
	Enforce    *e = run->work;
	RmStepResult result = RM_STEP_AGAIN;
	const char *rel_sql;
	Relation	rel;
	bool		valid;
	LOCKMODE	mode;

	if (e == NULL)
		e = run->work = MemoryContextAllocZero(run->cxt, sizeof(Enforce));
	/* a new run, also after a crash: what was verified then is not enough */
	if (!e->begun && m->phase < ENFORCE_VALIDATE)
		m->phase = ENFORCE_BEGIN;
	/* nor is it if the trigger was switched off for a moment */
	if (m->phase != ENFORCE_BEGIN && m->trigger_xmin != rm_trigger_xmin(m))
		m->phase = ENFORCE_BEGIN;
	e->xact_checked = e->xact_failures = e->xact_nulled = e->xact_mended = 0;

	mode = e->invalid ? AccessExclusiveLock :
		m->phase <= ENFORCE_VERIFY ? RowExclusiveLock :
		m->phase == ENFORCE_VALIDATE ? ShareUpdateExclusiveLock : AccessExclusiveLock;
	rm_lock_relation(&run->locks, m->relid, mode);
	rm_check_owner(m->relid, m->relation);
	rel = table_open(m->relid, NoLock);
	rm_check_ground(m, rel);
	if (mode == RowExclusiveLock)
		result = verify(run, rel);
	table_close(rel, NoLock);	/* ALTER TABLE wants it closed, but locked */
	if (mode == RowExclusiveLock)
		return result;

	if (m->trigger_xmin != rm_trigger_xmin(m))
	{
		m->phase = ENFORCE_BEGIN;	/* just now, before we had the lock */
		return RM_STEP_AGAIN;
	}
	rel_sql = rm_relation_sql(m->relid);
	if (mode == AccessExclusiveLock)
		run->old_storage = rm_relation_storage(m->relid);
	if (e->invalid)
	{
		/* a row without a value has come in: take the CHECK back, look again */
		if (OidIsValid(find_check(m, &valid)))
			rm_execute(psprintf("ALTER TABLE ONLY %s DROP CONSTRAINT %s", rel_sql,
								quote_identifier(rm_check_name(m))));
		set_enforced(m, false);
		m->phase = ENFORCE_BEGIN;
		return RM_STEP_AGAIN;
	}
	switch (m->phase)
	{
		case ENFORCE_ADD_CHECK:
			refuse_wrong_rows(run);
			if (accepts_null(run))
				return RM_STEP_DONE;	/* and no write fails later, either */
			if (failures_recorded(m))
			{
				m->phase = ENFORCE_BEGIN;	/* by a writer, since we passed by */
				break;
			}
			set_enforced(m, true);
			if (e->nullable)
				return RM_STEP_DONE;
			if (!OidIsValid(find_check(m, &valid)))
				rm_execute(psprintf("ALTER TABLE ONLY %s ADD CONSTRAINT %s CHECK (%s IS NOT NULL) NOT VALID",
									rel_sql, quote_identifier(rm_check_name(m)),
									column_sql(m, m->new_attnum)));
			m->phase = ENFORCE_VALIDATE;
			break;

		case ENFORCE_VALIDATE:
			if (!OidIsValid(find_check(m, &valid)))
			{
				m->phase = ENFORCE_BEGIN;	/* somebody has dropped it */
				set_enforced(m, false);
				break;
			}
			e->validating = true;
			if (!valid)
				rm_execute(psprintf("ALTER TABLE ONLY %s VALIDATE CONSTRAINT %s",
									rel_sql, quote_identifier(rm_check_name(m))));
			e->validating = false;
			m->phase = ENFORCE_SET_NOT_NULL;
			break;

		case ENFORCE_SET_NOT_NULL:
			if (!OidIsValid(find_check(m, &valid)) || !valid)
			{
				m->phase = ENFORCE_BEGIN;
				set_enforced(m, false);
				break;
			}
			rm_execute(psprintf("ALTER TABLE ONLY %s ALTER COLUMN %s SET NOT NULL",
								rel_sql, column_sql(m, m->new_attnum)));
			rm_execute(psprintf("ALTER TABLE ONLY %s DROP CONSTRAINT %s", rel_sql,
								quote_identifier(rm_check_name(m))));
			result = RM_STEP_DONE;
			break;
	}
	return result;
}

static void
enforce_committed(RmRun *run, RmStepResult result)
{
	Enforce    *e = run->work;
	char		checked[32];

	if (run->revert)
		return;
	e->begun = true;
	e->invalid = false;
	e->checked += e->xact_checked;
	e->failures += e->xact_failures;
	e->nulled += e->xact_nulled;
	e->mended += e->xact_mended;
	e->xact_checked = e->xact_failures = e->xact_nulled = e->xact_mended = 0;
	if (result != RM_STEP_DONE)
		return;
	if (e->nulled > 0)
		ereport(NOTICE,
				(errmsg_plural("%lld value of %s does not convert and is NULL",
							   "%lld values of %s do not convert and are NULL",
							   (unsigned long) e->nulled, (long long) e->nulled,
							   run->relation),
				 errhint("SELECT * FROM rm_conversion_errors shows them.")));
	rm_format_count(checked, sizeof(checked), e->checked);
	if (e->nullable)
		ereport(NOTICE,
				(errmsg("%s rows of %s verified equal, %lld mended; the old column allows NULL, and so does the new one",
						checked, run->relation, (long long) e->mended)));
	else
		ereport(NOTICE,
				(errmsg("%s rows of %s verified equal, %lld mended; the new column is NOT NULL",
						checked, run->relation, (long long) e->mended)));
}

static bool
enforce_retry(RmRun *run, ErrorData *error)
{
	Enforce    *e = run->work;

	if (e == NULL)
		return false;
	if (e->validating && error->sqlerrcode == ERRCODE_CHECK_VIOLATION)
	{
		e->validating = false;
		e->invalid = true;
		return true;
	}
	e->validating = false;
	if (!e->converting || e->careful ||
		!rm_is_conversion_failure(error->sqlerrcode))
		return false;
	e->converting = false;
	e->careful = true;
	return true;
}

static RmStepResult
enforce_revert(RmRun *run)
{
	RmMigration *m = run->m;
	const char *rel_sql;
	bool		valid;

	rm_lock_relation(&run->locks, m->relid, AccessExclusiveLock);
	rm_check_owner(m->relid, m->relation);
	run->old_storage = rm_relation_storage(m->relid);
	rel_sql = rm_relation_sql(m->relid);
	if (OidIsValid(find_check(m, &valid)))
		rm_execute(psprintf("ALTER TABLE ONLY %s DROP CONSTRAINT %s", rel_sql,
							quote_identifier(rm_check_name(m))));
	if (attribute_not_null(m->relid, m->new_attnum))
		rm_execute(psprintf("ALTER TABLE ONLY %s ALTER COLUMN %s DROP NOT NULL",
							rel_sql, column_sql(m, m->new_attnum)));
	set_enforced(m, false);
	return RM_STEP_DONE;
}

const RmStep rm_step_enforce_not_null = {
	.name = "enforce_not_null",
	.throttled = true,
	.apply = enforce_apply,
	.revert = enforce_revert,
	.committed = enforce_committed,
	.retry = enforce_retry,
};

static const RmStep *const steps[] = {
	[RM_ADD_COLUMN] = &rm_step_add_column,
	[RM_BACKFILL] = &rm_step_backfill,
	[RM_ENFORCE_NOT_NULL] = &rm_step_enforce_not_null,
	[RM_BUILD] = &rm_step_build,
	[RM_SWAP] = &rm_step_swap,
	[RM_CLEANUP] = &rm_step_cleanup,
};

const RmMethod rm_method_three_step = {
	.name = "three_step",
	.steps = steps,
	.nsteps = lengthof(steps),
};
