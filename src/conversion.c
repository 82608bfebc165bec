/*-------------------------------------------------------------------------
 *
 * conversion.c
 *	  The expression that makes a new value out of a row.
 *
 * ALTER TABLE evaluates its USING expression for all rows in one command of
 * one session.  Here the same expression is evaluated for years of rows by
 * whoever writes them: by the sync trigger in any session, by the backfill,
 * by the verification.  All must get the same value, so
 *
 *	the text is parsed once, when the migration starts, with the search_path
 *	of the one who starts it, and kept as an analyzed tree (column numbers and
 *	OIDs: no later search_path and no renaming changes what it means) with its
 *	deparsed, fully qualified text beside it for people and for the next major
 *	version, to which the tree means nothing;
 *
 *	the settings that conversions read (date style, time zone, ...) are kept
 *	too, and put in force around each evaluation where the session's differ;
 *
 *	what could differ from row to row or from role to role is refused:
 *	volatile functions, the clock, the current role, stable functions that are
 *	not PostgreSQL's own (they may read tables).  The strings 'now', 'today',
 *	'tomorrow' and 'yesterday' are dates that depend on when they are read;
 *	a row that holds one counts as a failure.
 *
 * Easy to get wrong: the expression may call functions of the table's owner,
 * and whoever writes the row need not be allowed to; and a writer must not be
 * tricked into running them with its own rights.  So it is evaluated as the
 * table's owner, in a security-restricted operation, like an index expression
 * under maintenance.  An error must leave no trace in the writer's
 * transaction: rm_conversion_try() evaluates in a subtransaction.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/sysattr.h"
#include "access/table.h"
#include "access/toast_compression.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/tablecmds.h"
#include "compat.h"
#include "conversion.h"
#include "fmgr.h"
#include "leaves.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/optimizer.h"
#include "parser/parse_coerce.h"
#include "parser/parse_collate.h"
#include "parser/parse_expr.h"
#include "parser/parse_func.h"
#include "parser/parse_node.h"
#include "parser/parse_relation.h"
#include "parser/parse_type.h"
#include "parser/parser.h"
#include "pgtime.h"
#include "state.h"
#include "tsearch/ts_cache.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/bytea.h"
#include "utils/datetime.h"
#include "utils/datum.h"
#include "utils/float.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/ruleutils.h"
#include "utils/syscache.h"
#include "utils/xml.h"

PG_FUNCTION_INFO_V1(rm_steady_text);

/* what a conversion may read; fixed, and documented in doc/architecture.md */
static const char *const setting_names[] = {
	"DateStyle", "TimeZone", "IntervalStyle", "timezone_abbreviations",
	"extra_float_digits", "bytea_output", "xmlbinary", "xmloption",
	"array_nulls", "lc_monetary", "lc_numeric", "lc_time",
	"default_text_search_config", "search_path",
};

/*
 * PostgreSQL's own stable functions whose value changes with the clock, the
 * session or the contents of tables.
 */
static const char *const unsteady_functions[] = {
	"now", "transaction_timestamp", "statement_timestamp", "clock_timestamp",
	"timeofday", "current_user", "session_user", "user", "current_role",
	"current_catalog", "current_database", "current_schema", "current_schemas",
	"current_setting", "current_query", "inet_client_addr",
	"inet_client_port", "inet_server_addr", "inet_server_port",
	"pg_backend_pid", "pg_conf_load_time", "pg_postmaster_start_time",
	"txid_current", "txid_current_if_assigned", "txid_current_snapshot",
	"pg_current_xact_id", "pg_current_xact_id_if_assigned",
	"pg_current_snapshot", "pg_my_temp_schema", "version",
	"table_to_xml", "query_to_xml", "cursor_to_xml", "schema_to_xml",
	"database_to_xml", "query_to_xml_and_xmlschema",
	"table_to_xml_and_xmlschema", "ts_stat", "ts_rewrite",
};

static Node *steady_strings_mutator(Node *node, void *context);

typedef struct RefuseContext
{
	const char *expr;
} RefuseContext;

/* "*" or "t.*", which only a list of targets can be */
static bool
is_star(Node *node)
{
	return node && IsA(node, ColumnRef) &&
		IsA(llast(((ColumnRef *) node)->fields), A_Star);
}

/* what was parsed, if it is one expression without anything around it, else NULL */
static Node *
single_expression(List *raw)
{
	SelectStmt *stmt = NULL;

	if (list_length(raw) == 1)
		stmt = (SelectStmt *) linitial_node(RawStmt, raw)->stmt;
	if (stmt == NULL || !IsA(stmt, SelectStmt) ||
		list_length(stmt->targetList) != 1 ||
		linitial_node(ResTarget, stmt->targetList)->name != NULL ||
		stmt->distinctClause || stmt->intoClause || stmt->fromClause ||
		stmt->whereClause || stmt->groupClause || stmt->havingClause ||
		stmt->windowClause || stmt->valuesLists || stmt->sortClause ||
		stmt->limitOffset || stmt->limitCount || stmt->lockingClause ||
		stmt->withClause || stmt->op != SETOP_NONE ||
		is_star(linitial_node(ResTarget, stmt->targetList)->val))
		return NULL;
	return linitial_node(ResTarget, stmt->targetList)->val;
}

/*
 * One expression from its text: neither further statements nor clauses can be
 * smuggled in.
 */
static Node *
parse_expression_text(const char *text, const char *what)
{
	Node	   *expr = single_expression(raw_parser(text, RAW_PARSE_PLPGSQL_EXPR));

	if (expr == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_SYNTAX_ERROR),
				 errmsg("%s is not a single expression", what),
				 errdetail("It is: %s", text),
				 errhint("Give one expression over the columns of the row, as after USING in ALTER TABLE.")));
	return expr;
}

/*
 * Refuses (42601) a text that is not one expression, and could say something
 * else where it is put into a statement.  what names it in the message.
 */
void
rm_conversion_check_text(const char *text, const char *what)
{
	(void) parse_expression_text(text, what);
}

static bool
is_unsteady_name(const char *name)
{
	for (int i = 0; i < lengthof(unsteady_functions); i++)
		if (strcmp(name, unsteady_functions[i]) == 0)
			return true;
	return false;
}

/* check_functions_in_node callback: is the function's result not fixed? */
static bool
function_is_unsteady(Oid funcid, void *context)
{
	bool		unsteady = false;
	HeapTuple	tup = SearchSysCache1(PROCOID, ObjectIdGetDatum(funcid));
	Form_pg_proc form;

	if (!HeapTupleIsValid(tup))
		elog(ERROR, "cache lookup failed for function %u", funcid);
	form = (Form_pg_proc) GETSTRUCT(tup);
	if (form->provolatile == PROVOLATILE_VOLATILE)
		unsteady = true;
	else if (form->provolatile == PROVOLATILE_STABLE)
		unsteady = funcid >= FirstNormalObjectId ||
			is_unsteady_name(NameStr(form->proname)) ||
			/* age(timestamp) counts from today */
			(strcmp(NameStr(form->proname), "age") == 0 && form->pronargs == 1);
	ReleaseSysCache(tup);
	return unsteady;
}

/* refuses whatever may not be the same for every row and every role */
static bool
refuse_unsteady_walker(Node *node, RefuseContext *context)
{
	if (node == NULL)
		return false;
	if (IsA(node, SQLValueFunction) || IsA(node, NextValueExpr) ||
		check_functions_in_node(node, function_is_unsteady, NULL))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the USING expression must give the same value whenever and by whomever it is evaluated"),
				 errdetail("The expression %s calls a volatile function, one that reads the clock or the session, or a stable function that may read tables.",
						   context->expr),
				 errhint("Use immutable functions; mark your own IMMUTABLE if they are.")));
	if (IsA(node, Var) && ((Var *) node)->varattno <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the USING expression may not use system columns or the whole row"),
				 errdetail("The expression is: %s", context->expr),
				 errhint("Name the columns that it needs.")));
	return expression_tree_walker(node, refuse_unsteady_walker, context);
}

/* columns whose value a STORED generated column has only after the trigger */
static void
refuse_generated(Relation rel, Node *expr, const char *text)
{
	Bitmapset  *attnos = NULL;
	int			i = -1;

	pull_varattnos(expr, 1, &attnos);
	while ((i = bms_next_member(attnos, i)) >= 0)
	{
		AttrNumber	attnum = i + FirstLowInvalidHeapAttributeNumber;
		Form_pg_attribute att;

		if (attnum <= 0)
			continue;
		att = TupleDescAttr(RelationGetDescr(rel), attnum - 1);
		if (att->attgenerated)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("the USING expression may not use the generated column \"%s\"",
							NameStr(att->attname)),
					 errdetail("Its value is not yet known when the sync trigger fires. The expression is: %s", text),
					 errhint("Write the generated column's own expression instead.")));
	}
}

/* the session's settings that a conversion may read, as name=value */
static List *
current_settings(void)
{
	List	   *settings = NIL;

	for (int i = 0; i < lengthof(setting_names); i++)
	{
		const char *value = GetConfigOption(setting_names[i], true, false);

		if (value)
			settings = lappend(settings, psprintf("%s=%s", setting_names[i], value));
	}
	return settings;
}

/* analyzes one expression over rel's row and coerces it to the new type */
static Node *
analyze_expression(Relation rel, const char *text, Oid type, int32 typmod)
{
	ParseState *pstate = make_parsestate(NULL);
	ParseNamespaceItem *nsitem;
	Node	   *expr;
	Node	   *coerced;

	pstate->p_sourcetext = text;
	nsitem = addRangeTableEntryForRelation(pstate, rel, AccessShareLock, NULL,
										   false, true);
	addNSItemToQuery(pstate, nsitem, false, true, true);

	expr = transformExpr(pstate, parse_expression_text(text, "the USING expression"),
						 EXPR_KIND_ALTER_COL_TRANSFORM);
	coerced = coerce_to_target_type(pstate, expr, exprType(expr), type, typmod,
									COERCION_ASSIGNMENT, COERCE_IMPLICIT_CAST,
									-1);
	if (coerced == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("the USING expression cannot be cast automatically to type %s",
						format_type_with_typemod(type, typmod)),
				 errdetail("The expression %s has the type %s.", text,
						   format_type_be(exprType(expr))),
				 errhint("Add an explicit cast, such as \"(%s)::%s\".", text,
						 format_type_with_typemod(type, typmod))));
	assign_expr_collations(pstate, coerced);
	free_parsestate(pstate);
	return coerced;
}

/*
 * For PG_CATCH: raises the error again, with that detail and hint where it has
 * none of its own.  A position in the text that the user gave is told with that
 * text, not with the statement around it.
 */
void
rm_rethrow_explained(MemoryContext cxt, const char *text, const char *detail,
					 const char *hint)
{
	ErrorData  *error;

	MemoryContextSwitchTo(cxt);
	error = CopyErrorData();
	if (rm_is_conversion_failure(error->sqlerrcode))
	{
		if (error->detail == NULL)
			error->detail = pstrdup(detail);
		if (error->hint == NULL)
			error->hint = pstrdup(hint);
	}
	FlushErrorState();			/* detail may have been made in its memory */
	if (text && error->cursorpos > 0 && error->internalquery == NULL)
	{
		error->internalquery = pstrdup(text);
		error->internalpos = error->cursorpos;
		error->cursorpos = 0;
	}
	ReThrowError(error);
}

static bool
has_word_collate(const char *text)
{
	for (; *text; text++)
		if (pg_strncasecmp(text, "collate", strlen("collate")) == 0)
			return true;
	return false;
}

/* "type COLLATE collation", as a cast to it; false if it is something else */
static bool
parse_collated_type(const char *text, Oid *type, int32 *typmod, Oid *collation)
{
	CollateClause *clause = (CollateClause *) single_expression(raw_parser(text, RAW_PARSE_PLPGSQL_EXPR));
	TypeCast   *cast;

	if (clause == NULL || !IsA(clause, CollateClause) || !IsA(clause->arg, TypeCast))
		return false;
	cast = (TypeCast *) clause->arg;
	if (!IsA(cast->arg, A_Const) || cast->typeName->setof)
		return false;
	typenameTypeIdAndMod(NULL, cast->typeName, type, typmod);
	*collation = get_collation_oid(clause->collname, false);
	if (!type_is_collatable(*type))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("collations are not supported by type %s", format_type_be(*type)),
				 errdetail("The type has no order that depends on a language."),
				 errhint("Leave COLLATE out.")));
	return true;
}

/*
 * The type of that name, with a collation (else that is InvalidOid) as in ALTER TABLE;
 * PostgreSQL's own errors, explained.
 */
static void
parse_type(const char *name, Oid *type, int32 *typmod, Oid *collation)
{
	MemoryContext cxt = CurrentMemoryContext;
	const char *volatile parsed = name;

	*collation = InvalidOid;
	PG_TRY();
	{
		if (has_word_collate(name))
			parsed = psprintf("NULL::%s", name);
		if (parsed == name || !parse_collated_type(parsed, type, typmod, collation))
		{
			parsed = name;
			rm_parse_type(name, type, typmod);
		}
	}
	PG_CATCH();
	{
		rm_rethrow_explained(cxt, parsed, psprintf("The new type was given as \"%s\", and is looked for with the present search_path.", name),
							 "Give the type's name as in ALTER TABLE, with its schema if need be.");
	}
	PG_END_TRY();
}

/*
 * The USING expression, analyzed and checked; PostgreSQL's own errors,
 * explained.
 */
static Node *
parse_expression(Relation rel, const char *text, Oid type, int32 typmod)
{
	MemoryContext cxt = CurrentMemoryContext;
	RefuseContext context = {.expr = text};
	Node	   *volatile expr = NULL;

	PG_TRY();
	{
		expr = analyze_expression(rel, text, type, typmod);
		(void) refuse_unsteady_walker(expr, &context);
		refuse_generated(rel, expr, text);
		/* what is constant in it may not depend on the clock either */
		(void) expression_planner((Expr *) steady_strings_mutator(copyObject(expr), NULL));
	}
	PG_CATCH();
	{
		rm_rethrow_explained(cxt, text, psprintf("The USING expression is: %s", text),
							 "Give one expression over the columns of the row, as after USING in ALTER TABLE.");
	}
	PG_END_TRY();
	return expr;
}

/*
 * What ALTER TABLE resets when it changes the type: collation, storage and
 * compression, where they are not the type's defaults.
 */
static void
describe_column(Form_pg_attribute att, RmConversionDef *def)
{
	if (OidIsValid(att->attcollation) &&
		att->attcollation != get_typcollation(att->atttypid))
		def->old_collation = generate_collation_name(att->attcollation);
	if (att->attstorage != get_typstorage(att->atttypid))
		switch (att->attstorage)
		{
			case TYPSTORAGE_PLAIN:
				def->old_storage = "PLAIN";
				break;
			case TYPSTORAGE_EXTERNAL:
				def->old_storage = "EXTERNAL";
				break;
			case TYPSTORAGE_MAIN:
				def->old_storage = "MAIN";
				break;
			default:
				def->old_storage = "EXTENDED";
		}
	if (CompressionMethodIsValid(att->attcompression))
		def->old_compression = att->attcompression == TOAST_LZ4_COMPRESSION ? "lz4" : "pglz";
}

/*
 * Parses and checks a conversion of one column, with the caller's search_path
 * and settings.  using_expr NULL means the plain assignment cast.  The caller
 * holds a lock on rel.  Errors: 42703 no such column, 42704 no such type,
 * 42804 no cast, 42601, 0A000 for what may not be used; all before anything
 * is changed.
 */
RmConversionDef *
rm_conversion_parse(Relation rel, const char *column, const char *type_name,
					const char *using_expr)
{
	RmConversionDef *def = palloc0(sizeof(RmConversionDef));
	Form_pg_attribute att;
	Node	   *expr;
	Oid			collation;
	int			save_nestlevel;

	def->relid = RelationGetRelid(rel);
	def->column = pstrdup(column);
	def->attnum = get_attnum(def->relid, column);
	if (def->attnum == InvalidAttrNumber)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("column \"%s\" of relation \"%s\" does not exist",
						column, RelationGetRelationName(rel)),
				 errdetail("No column of the table has that name."),
				 errhint("Column names are taken as they are, without folding to lower case.")));
	if (def->attnum < 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot change the type of system column \"%s\"", column),
				 errdetail("System columns are PostgreSQL's own."),
				 errhint("Name a column of your own.")));
	att = TupleDescAttr(RelationGetDescr(rel), def->attnum - 1);
	if (att->attgenerated)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot change the type of generated column \"%s\"", column),
				 errdetail("Its values are made by its own expression, and by no other."),
				 errhint("Drop it and add it again with the new type; or use ALTER TABLE, which rewrites the table under its lock.")));

	parse_type(type_name, &def->type, &def->typmod, &collation);
	if (get_typtype(def->type) == TYPTYPE_PSEUDO)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("column \"%s\" cannot have pseudo-type %s", column,
						format_type_be(def->type)),
				 errdetail("Pseudo-types have no values that could be stored."),
				 errhint("Name a type that a column can have.")));

	if (using_expr == NULL)
		using_expr = quote_identifier(column);
	expr = parse_expression(rel, using_expr, def->type, def->typmod);

	def->old_type = att->atttypid;
	def->tree = nodeToString(expr);
	def->server_version = PG_VERSION_NUM / 10000;
	def->settings = current_settings();

	save_nestlevel = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp",
							 PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true,
							 0, false);
	def->using_expr = deparse_expression(expr,
										 deparse_context_for(RelationGetRelationName(rel),
															 def->relid),
										 false, false);
	def->type_name = format_type_extended(def->type, def->typmod,
										  FORMAT_TYPE_TYPEMOD_GIVEN |
										  FORMAT_TYPE_FORCE_QUALIFY);
	if (OidIsValid(collation) && collation != get_typcollation(def->type))
		def->type_name = psprintf("%s COLLATE %s", def->type_name, generate_collation_name(collation));
	def->old_type_name = format_type_extended(att->atttypid, att->atttypmod,
											  FORMAT_TYPE_TYPEMOD_GIVEN |
											  FORMAT_TYPE_FORCE_QUALIFY);
	describe_column(att, def);
	AtEOXact_GUC(false, save_nestlevel);
	return def;
}

/* of no column: the rows stay what they are */
RmConversionDef *
rm_conversion_none(Relation rel)
{
	RmConversionDef *def = palloc0(sizeof(RmConversionDef));

	def->relid = RelationGetRelid(rel);
	def->column = def->type_name = def->old_type_name = def->using_expr = def->tree = "";
	def->typmod = -1;
	def->server_version = PG_VERSION_NUM / 10000;
	def->settings = current_settings();
	return def;
}

/*
 * The expression that makes the old value out of a row after the swap, as a
 * tree.  text is written for the time after the swap, when the column's name
 * means the new one; rel is how the table looks then.  NULL means the cast
 * back; without such a cast NULL is returned.  Errors as above.
 */
char *
rm_conversion_parse_reverse(Relation rel, const char *column, const char *text,
							Oid old_type, int32 old_typmod)
{
	RefuseContext context;
	Node	   *expr;

	if (text == NULL)
	{
		Oid			new_type = get_atttype(RelationGetRelid(rel),
										   get_attnum(RelationGetRelid(rel), column));

		if (!can_coerce_type(1, &new_type, &old_type, COERCION_EXPLICIT))
			return NULL;
		/* the length is assigned, not cast: what is too long must not be cut */
		text = psprintf("%s::%s", quote_identifier(column),
						format_type_extended(old_type, -1, FORMAT_TYPE_TYPEMOD_GIVEN |
											 FORMAT_TYPE_FORCE_QUALIFY));
	}
	context.expr = text;
	expr = analyze_expression(rel, text, old_type, old_typmod);
	(void) refuse_unsteady_walker(expr, &context);
	refuse_generated(rel, expr, text);
	return nodeToString(expr);
}

static bool
is_clock_type(Oid type)
{
	switch (getBaseType(type))
	{
		case DATEOID:
		case TIMEOID:
		case TIMETZOID:
		case TIMESTAMPOID:
		case TIMESTAMPTZOID:
			return true;
		default:
			return false;
	}
}

/*
 * Puts steady_text() around every string that is read as a date or time, so
 * that 'today' and its like are found wherever they come from.
 */
static Node *
steady_strings_mutator(Node *node, void *context)
{
	CoerceViaIO *coerce;
	Oid			string_type;

	if (node == NULL)
		return NULL;
	node = expression_tree_mutator(node, steady_strings_mutator, context);
	if (!IsA(node, CoerceViaIO) || !is_clock_type(((CoerceViaIO *) node)->resulttype))
		return node;
	coerce = (CoerceViaIO *) node;
	string_type = getBaseType(exprType((Node *) coerce->arg));
	if (string_type == TEXTOID || string_type == VARCHAROID || string_type == BPCHAROID)
	{
		Oid			arg_types[] = {TEXTOID};
		Oid			function = LookupFuncName(list_make2(makeString(RM_SCHEMA),
														 makeString("steady_text")),
											  1, arg_types, false);
		Expr	   *text = (Expr *) makeRelabelType(coerce->arg, TEXTOID, -1,
													DEFAULT_COLLATION_OID,
													COERCE_IMPLICIT_CAST);

		coerce->arg = (Expr *) makeFuncExpr(function, TEXTOID, list_make1(text),
											DEFAULT_COLLATION_OID,
											DEFAULT_COLLATION_OID,
											COERCE_EXPLICIT_CALL);
	}
	return node;
}

/* do all columns that the expression reads still exist with their types? */
static bool
columns_unchanged_walker(Node *node, Relation rel)
{
	if (node == NULL)
		return false;
	if (IsA(node, Var))
	{
		Var		   *var = (Var *) node;
		Form_pg_attribute att;

		if (var->varattno <= 0 ||
			var->varattno > RelationGetDescr(rel)->natts)
			return true;
		att = TupleDescAttr(RelationGetDescr(rel), var->varattno - 1);
		return att->attisdropped || att->atttypid != var->vartype;
	}
	return expression_tree_walker(node, columns_unchanged_walker, rel);
}

/*
 * Loads a conversion of the table root into cxt, for the rows of rel, which is
 * root or a partition of it.  NULL if a column that it reads has been dropped or
 * has another type by now.
 */
RmConversion *
rm_conversion_load(const char *tree, int server_version,
				   const char *using_expr, Oid root, Relation rel, Oid type,
				   int32 typmod, AttrNumber target, List *settings,
				   MemoryContext cxt)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(cxt);
	RmConversion *conv = palloc0(sizeof(RmConversion));
	Node	   *expr;
	Oid			save_userid;
	int			save_sec_context;
	ListCell   *lc;

	if (server_version == PG_VERSION_NUM / 10000)
		expr = rm_leaf_expression(stringToNode(tree), root, rel);
	else
		expr = analyze_expression(rel, using_expr, type, typmod);
	if (columns_unchanged_walker(expr, rel))
	{
		MemoryContextSwitchTo(oldcxt);
		return NULL;
	}

	conv->cxt = cxt;
	conv->target = target;
	conv->role = rel->rd_rel->relowner;
	/* planning evaluates what is constant: as the owner, like all of it */
	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(conv->role, save_sec_context | SECURITY_RESTRICTED_OPERATION);
	conv->expr = expression_planner((Expr *) steady_strings_mutator(expr, NULL));
	SetUserIdAndSecContext(save_userid, save_sec_context);
	get_typlenbyval(type, &conv->typlen, &conv->typbyval);
	foreach(lc, settings)
		conv->settings = lappend(conv->settings, pstrdup(lfirst(lc)));
	MemoryContextSwitchTo(oldcxt);
	return conv;
}

/*
 * Makes it ready for evaluation, with all that is needed in cxt (which lives
 * as long as it is evaluated: a statement, a transaction).
 */
void
rm_conversion_prepare(RmConversion *conv, MemoryContext cxt)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(cxt);
	Oid			save_userid;
	int			save_sec_context;

	/* functions are checked for EXECUTE when the expression is compiled */
	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(conv->role,
						   save_sec_context | SECURITY_RESTRICTED_OPERATION);
	conv->state = ExecInitExpr(conv->expr, NULL);
	conv->econtext = CreateStandaloneExprContext();
	SetUserIdAndSecContext(save_userid, save_sec_context);
	MemoryContextSwitchTo(oldcxt);
}

/* is the value of that setting the one wanted?  setting is name=value */
static bool
setting_in_force(const char *setting)
{
	const char *eq = strchr(setting, '=');
	char		name[NAMEDATALEN];
	const char *value;

	strlcpy(name, setting, Min(sizeof(name), (size_t) (eq - setting) + 1));
	value = GetConfigOption(name, true, false);
	return value != NULL && strcmp(value, eq + 1) == 0;
}

/* puts those settings in force that differ; action as in set_config_option */
void
rm_settings_apply(List *settings, int action)
{
	ListCell   *lc;

	foreach(lc, settings)
	{
		const char *setting = lfirst(lc);
		const char *eq = strchr(setting, '=');

		if (setting_in_force(setting))
			continue;
		(void) set_config_option(pnstrdup(setting, eq - setting), eq + 1,
								 PGC_USERSET, PGC_S_SESSION,
								 (GucAction) action, true, 0, false);
	}
}

/*
 * Is everything in force?  This is asked for every row, so the variables
 * behind the settings are compared with what they were when all settings were
 * last looked up; only when one of them has moved is that done again.
 */
static bool
settings_in_force(RmConversion *conv)
{
	RmSettingsSeen now;
	ListCell   *lc;

	memset(&now, 0, sizeof(now));
	now.date_style = DateStyle;
	now.date_order = DateOrder;
	now.interval_style = IntervalStyle;
	now.float_digits = extra_float_digits;
	now.bytea = bytea_output;
	now.xmlbin = xmlbinary;
	now.xmlopt = xmloption;
	now.nulls = Array_nulls;
	now.zone = session_timezone;	/* never freed, so never another zone */
	strlcpy(now.path, namespace_search_path, sizeof(now.path));
	/* their variables are declared in a header that needs ICU's */
	strlcpy(now.monetary, GetConfigOption("lc_monetary", false, false), sizeof(now.monetary));
	strlcpy(now.numeric, GetConfigOption("lc_numeric", false, false), sizeof(now.numeric));
	strlcpy(now.lctime, GetConfigOption("lc_time", false, false), sizeof(now.lctime));
	strlcpy(now.tsconfig, TSCurrentConfig, sizeof(now.tsconfig));
	if (conv->seen_valid && memcmp(&now, &conv->seen, sizeof(now)) == 0)
		return conv->seen_in_force;

	conv->seen_in_force = true;
	foreach(lc, conv->settings)
		if (!setting_in_force(lfirst(lc)))
		{
			conv->seen_in_force = false;
			break;
		}
	memcpy(&conv->seen, &now, sizeof(now));
	/* a search_path too long to be compared is looked up every time */
	conv->seen_valid = strlen(namespace_search_path) < sizeof(now.path);
	return conv->seen_in_force;
}

/* does the string name a moment by the clock? */
static bool
names_the_clock(const char *s, int len)
{
	static const char *const words[] = {"now", "today", "tomorrow", "yesterday"};

	for (int i = 0; i < len; i++)
	{
		if (!isalpha((unsigned char) s[i]) ||
			(i > 0 && isalpha((unsigned char) s[i - 1])))
			continue;
		for (int w = 0; w < lengthof(words); w++)
		{
			int			n = strlen(words[w]);

			if (i + n <= len && pg_strncasecmp(s + i, words[w], n) == 0 &&
				(i + n == len || !isalpha((unsigned char) s[i + n])))
				return true;
		}
	}
	return false;
}

/*
 * risky_migrations.steady_text(text) returns text
 */
Datum
rm_steady_text(PG_FUNCTION_ARGS)
{
	text	   *t = PG_GETARG_TEXT_PP(0);

	if (names_the_clock(VARDATA_ANY(t), VARSIZE_ANY_EXHDR(t)))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_DATETIME_FORMAT),
				 errmsg("value \"%s\" depends on the clock", text_to_cstring(t)),
				 errdetail("It would be another date or time for every row that is converted at another moment."),
				 errhint("Write the date or time that is meant.")));
	PG_RETURN_TEXT_P(t);
}

/*
 * The new value for the row in slot, in the expression context's per-tuple
 * memory (reset by the next call).  Errors are those of the conversion; the
 * caller sees to the clean-up (user id and settings come back with its abort
 * or subtransaction abort).
 */
Datum
rm_conversion_evaluate(RmConversion *conv, TupleTableSlot *slot, bool *isnull)
{
	Oid			save_userid;
	int			save_sec_context;
	int			save_nestlevel = -1;
	Datum		value;

	ResetExprContext(conv->econtext);
	conv->econtext->ecxt_scantuple = slot;

	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(conv->role,
						   save_sec_context | SECURITY_RESTRICTED_OPERATION);
	if (!conv->settings_fixed && !settings_in_force(conv))
	{
		save_nestlevel = NewGUCNestLevel();
		rm_settings_apply(conv->settings, GUC_ACTION_SAVE);
	}
	value = ExecEvalExprSwitchContext(conv->state, conv->econtext, isnull);
	if (save_nestlevel >= 0)
		AtEOXact_GUC(false, save_nestlevel);
	SetUserIdAndSecContext(save_userid, save_sec_context);
	return value;
}

/*
 * Is it the value's fault?  Not so: cancellation and shutdown (57), lack of
 * resources (53), rollbacks by concurrency (40), internal errors (XX), I/O
 * (58), locks (55).
 */
bool
rm_is_conversion_failure(int sqlerrcode)
{
	int			category = ERRCODE_TO_CATEGORY(sqlerrcode);

	return category != ERRCODE_TO_CATEGORY(ERRCODE_QUERY_CANCELED) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_INSUFFICIENT_RESOURCES) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_TRANSACTION_ROLLBACK) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_INTERNAL_ERROR) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_IO_ERROR) &&
		category != ERRCODE_TO_CATEGORY(ERRCODE_LOCK_NOT_AVAILABLE);
}

/*
 * For PG_CATCH, in a subtransaction in which something was converted: rolls it
 * back and returns the error, in cxt, if the value is at fault; else raises it
 * again, in the transaction around: whoever catches it there knows nothing of
 * ours.
 */
ErrorData *
rm_conversion_caught(MemoryContext cxt)
{
	ErrorData  *error;

	MemoryContextSwitchTo(cxt);
	error = CopyErrorData();
	FlushErrorState();
	RollbackAndReleaseCurrentSubTransaction();
	if (!rm_is_conversion_failure(error->sqlerrcode))
		ReThrowError(error);
	return error;
}

/*
 * The same in a subtransaction: true and the value, copied to cxt; or false
 * and the error, also in cxt, if the value is at fault.  Other errors are
 * raised.
 */
bool
rm_conversion_try(RmConversion *conv, TupleTableSlot *slot, MemoryContext cxt,
				  Datum *value, bool *isnull, ErrorData **error)
{
	MemoryContext oldcxt = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	volatile bool ok = true;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		Datum		d = rm_conversion_evaluate(conv, slot, isnull);

		MemoryContextSwitchTo(cxt);
		*value = *isnull ? (Datum) 0 : datumCopy(d, conv->typbyval, conv->typlen);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		*error = rm_conversion_caught(cxt);
		ok = false;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcxt);
	CurrentResourceOwner = oldowner;
	return ok;
}

/* list of name=value as text[], and back */
Datum
rm_settings_array(List *settings)
{
	Datum	   *elems = palloc(sizeof(Datum) * Max(list_length(settings), 1));
	int			n = 0;
	ListCell   *lc;

	foreach(lc, settings)
		elems[n++] = CStringGetTextDatum(lfirst(lc));
	return PointerGetDatum(construct_array(elems, n, TEXTOID, -1, false,
										   TYPALIGN_INT));
}

List *
rm_settings_list(Datum array)
{
	Datum	   *elems;
	int			n;
	List	   *settings = NIL;

	deconstruct_array(DatumGetArrayTypeP(array), TEXTOID, -1, false,
					  TYPALIGN_INT, &elems, NULL, &n);
	for (int i = 0; i < n; i++)
		settings = lappend(settings, TextDatumGetCString(elems[i]));
	return settings;
}
