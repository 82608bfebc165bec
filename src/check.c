/*-------------------------------------------------------------------------
 *
 * check.c
 *	  rm_check_conversion: which rows would not convert, told beforehand.
 *
 * Reads the table in the order of its pages with no lock but ACCESS SHARE and
 * evaluates the expression for every row, under the session's settings, as the
 * migration would.  A subtransaction costs more than a conversion, so a page is
 * tried as a whole first; only a page with a row that fails is gone through row
 * by row.  When no row fails it is a sequential scan that evaluates the
 * expression and little more.
 *
 * The rows that fail are listed up to a limit; all are counted, by what is
 * wrong with them: the message without what it quotes.
 *
 * Easy to get wrong: the result is about now.  Rows that are written later are
 * the sync trigger's business.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_am.h"
#include "catalog/pg_class.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "rows.h"
#include "storage/bufmgr.h"
#include "surface.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/tuplestore.h"

PG_FUNCTION_INFO_V1(rm_check_conversion);

/* length of a kind of failure that is told apart from others */
#define KIND_LEN 120

/* failures of one kind: SQLSTATE and message without what it quotes */
typedef struct FailureKind
{
	char		kind[KIND_LEN]; /* hash key */
	int64		rows;
} FailureKind;

/* a row that fails, listed */
typedef struct FailedRow
{
	char	   *key;
	char	   *value;
	int			sqlerrcode;
	char	   *message;
	FailureKind *kind;
} FailedRow;

typedef struct Check
{
	RmRows	   *rows;
	MemoryContext cxt;			/* of the result */
	HTAB	   *kinds;
	List	   *failed;			/* of FailedRow, at most limit */
	int64		limit;
	bool		first_only;		/* stop at the first one */
} Check;

/* SQLSTATE and message, without what stands between its first and last quote */
static void
make_kind(char *kind, int sqlerrcode, const char *message)
{
	const char *first = strchr(message, '"');
	const char *last = strrchr(message, '"');
	int			before = first ? (int) (first - message) : (int) strlen(message);

	memset(kind, 0, KIND_LEN);
	snprintf(kind, KIND_LEN, "%s %.*s%s", unpack_sql_state(sqlerrcode),
			 Min(before, KIND_LEN / 2), message, last ? last + 1 : "");
}

/* tries all rows of a page at once; false if one of them fails */
static bool
try_page(Check *check, Buffer buf, const OffsetNumber *offsets, int n)
{
	MemoryContext oldcxt = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	volatile bool ok = true;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(oldcxt);
	PG_TRY();
	{
		for (int i = 0; i < n; i++)
		{
			Datum		value;
			bool		isnull;

			rm_row_get(check->rows, buf, offsets[i]);
			(void) rm_row_convert(check->rows, false, &value, &isnull, NULL);
		}
		ExecClearTuple(check->rows->slot);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		/* the slot's pin belongs to the subtransaction: give it back first */
		ExecClearTuple(check->rows->slot);
		FreeErrorData(rm_conversion_caught(oldcxt));
		ok = false;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcxt);
	CurrentResourceOwner = oldowner;
	return ok;
}

/* counts a failure, and lists it if there is room */
static void
note_failure(Check *check, ErrorData *error)
{
	char		key[KIND_LEN];
	bool		found;
	FailureKind *kind;
	MemoryContext oldcxt;
	FailedRow  *row;

	make_kind(key, error->sqlerrcode, error->message);
	kind = hash_search(check->kinds, key, HASH_ENTER, &found);
	if (!found)
		kind->rows = 0;
	kind->rows++;
	if (list_length(check->failed) >= check->limit)
		return;

	oldcxt = MemoryContextSwitchTo(check->cxt);
	row = palloc0(sizeof(FailedRow));
	row->key = rm_row_key(check->rows->rel, check->rows->slot);
	row->value = rm_row_value(check->rows);
	row->sqlerrcode = error->sqlerrcode;
	row->message = pstrdup(error->message);
	row->kind = kind;
	check->failed = lappend(check->failed, row);
	MemoryContextSwitchTo(oldcxt);
}

static void
check_page(Check *check, BlockNumber block)
{
	OffsetNumber offsets[MaxHeapTuplesPerPage];
	Buffer		buf = ReadBuffer(check->rows->rel, block);
	int			dead;
	int			n = rm_rows_on_page(check->rows, buf, false, offsets, &dead);

	if (n > 0 && !try_page(check, buf, offsets, n))
		for (int i = 0; i < n; i++)
		{
			Datum		value;
			bool		isnull;
			ErrorData  *error;

			rm_row_get(check->rows, buf, offsets[i]);
			if (!rm_row_convert(check->rows, true, &value, &isnull, &error))
				note_failure(check, error);
		}
	ExecClearTuple(check->rows->slot);
	ReleaseBuffer(buf);
}

static void
put_result(Check *check, ReturnSetInfo *rsinfo)
{
	ListCell   *lc;

	foreach(lc, check->failed)
	{
		FailedRow  *row = lfirst(lc);
		Datum		values[5];
		bool		nulls[5] = {false};

		values[0] = CStringGetTextDatum(row->key);
		nulls[1] = row->value == NULL;
		if (row->value)
			values[1] = CStringGetTextDatum(row->value);
		values[2] = CStringGetTextDatum(unpack_sql_state(row->sqlerrcode));
		values[3] = CStringGetTextDatum(row->message);
		values[4] = Int64GetDatum(row->kind->rows);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
}

/* goes through the table, of which the caller holds a lock */
static void
run_check(Check *check, Relation rel, const char *column, const char *new_type,
		  const char *using_expr)
{
	HASHCTL		ctl = {.keysize = KIND_LEN,.entrysize = sizeof(FailureKind)};
	RmConversionDef *def = rm_conversion_parse(rel, column, new_type, using_expr);
	RmMigration m = {0};
	BlockNumber end;

	m.relid = RelationGetRelid(rel);
	m.relation = RelationGetRelationName(rel);
	m.attnum = def->attnum;
	m.new_type_id = def->type;
	m.new_typmod = def->typmod;
	m.using_expr = def->using_expr;
	m.tree = def->tree;
	m.server_version = def->server_version;
	m.settings = def->settings;

	check->kinds = hash_create("rm kinds of failure", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	check->rows = rm_rows_open(&m, rel, RM_ROWS_READ);
	end = RelationGetNumberOfBlocks(rel);
	for (BlockNumber block = 0; block < end; block++)
	{
		CHECK_FOR_INTERRUPTS();
		check_page(check, block);
		if (check->first_only && check->failed != NIL)
			break;
	}
	rm_rows_close(check->rows);
}

/*
 * Key of the first row found that does not convert, and its error, in the
 * current memory context; NULL if all do.  Waits for ACCESS SHARE as long as
 * lock_timeout says.
 */
char *
rm_first_failure(Oid relid, const char *column, const char *new_type,
				 const char *using_expr, ErrorData **error)
{
	Check		check = {.cxt = CurrentMemoryContext,.limit = 1,.first_only = true};
	Relation	rel = rm_open_found(relid);
	FailedRow  *row;

	run_check(&check, rel, column, new_type, using_expr);
	relation_close(rel, NoLock);
	if (check.failed == NIL)
		return NULL;
	row = linitial(check.failed);
	*error = palloc0(sizeof(ErrorData));
	(*error)->sqlerrcode = row->sqlerrcode;
	(*error)->message = row->message;
	return row->key;
}

/*
 * rm_check_conversion(relation text, column_name text, new_type text,
 *					   using_expr text, max_rows bigint)
 * returns setof (row_key text, value text, sqlstate text, message text,
 *				  rows_like_it bigint)
 */
Datum
rm_check_conversion(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	char	   *column = rm_text_argument(fcinfo, 1, "column_name");
	char	   *new_type = rm_text_argument(fcinfo, 2, "new_type");
	char	   *using_expr = PG_ARGISNULL(3) ? NULL : rm_text_argument(fcinfo, 3, "using_expr");
	Oid			relid = rm_find_relation(rm_text_argument(fcinfo, 0, "relation"));
	Check		check = {.cxt = CurrentMemoryContext};
	Relation	rel;

	check.limit = rm_count_argument(fcinfo, 4, "max_rows", 1, 1000000);
	rel = rm_open_found(relid);
	rm_check_owner(relid, RelationGetRelationName(rel));
	if (rel->rd_rel->relkind != RELKIND_RELATION ||
		rel->rd_rel->relam != HEAP_TABLE_AM_OID)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" is not an ordinary table", RelationGetRelationName(rel)),
				 errdetail("Only tables of the access method heap can be read page by page."),
				 errhint("Of a partitioned table, name the partitions one by one.")));
	InitMaterializedSRF(fcinfo, 0);
	run_check(&check, rel, column, new_type, using_expr);
	relation_close(rel, NoLock);
	put_result(&check, rsinfo);
	hash_destroy(check.kinds);
	return (Datum) 0;
}
