/*-------------------------------------------------------------------------
 *
 * conversion.h
 *	  The expression that makes a new value out of a row.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_CONVERSION_H
#define RM_CONVERSION_H

#include "executor/tuptable.h"
#include "nodes/execnodes.h"
#include "nodes/pg_list.h"
#include "utils/rel.h"

/* a conversion as it is kept in the migration's row: of one column */
typedef struct RmConversionDef
{
	Oid			relid;
	AttrNumber	attnum;			/* the column that changes */
	char	   *column;			/* its name */
	Oid			old_type;
	Oid			type;			/* the type it gets */
	int32		typmod;
	char	   *type_name;		/* formatted, for SQL and for people; with its COLLATE */
	char	   *old_type_name;
	char	   *old_collation;	/* SQL names; NULL where it is the default */
	char	   *old_storage;
	char	   *old_compression;
	char	   *using_expr;		/* deparsed, all names qualified */
	char	   *tree;			/* nodeToString of the analyzed expression */
	int			server_version; /* PG_VERSION_NUM / 10000 that wrote tree */
	List	   *settings;		/* of char *, name=value */
} RmConversionDef;

/* the variables behind the settings, at the last look */
typedef struct RmSettingsSeen
{
	int			date_style,
				date_order,
				interval_style,
				float_digits,
				bytea,
				xmlbin,
				xmlopt;
	bool		nulls;
	const void *zone;
	char		path[256];
	char		monetary[64],
				numeric[64],
				lctime[64],
				tsconfig[64];
} RmSettingsSeen;

/* the same, ready to be evaluated */
typedef struct RmConversion
{
	MemoryContext cxt;			/* holds all of this */
	AttrNumber	target;			/* column that gets the value, or 0 */
	int16		typlen;
	bool		typbyval;
	Oid			role;			/* evaluated as this role: the table's owner */
	Expr	   *expr;
	List	   *settings;
	ExprState  *state;			/* set by rm_conversion_prepare */
	ExprContext *econtext;
	bool		settings_fixed; /* the caller has applied the settings */
	bool		seen_valid;
	bool		seen_in_force;
	RmSettingsSeen seen;
} RmConversion;

extern RmConversionDef *rm_conversion_parse(Relation rel, const char *column,
											const char *type_name,
											const char *using_expr);
extern RmConversionDef *rm_conversion_none(Relation rel);
extern char *rm_conversion_parse_reverse(Relation rel, const char *column,
										 const char *text, Oid old_type,
										 int32 old_typmod);
extern void rm_conversion_check_text(const char *text, const char *what);
extern RmConversion *rm_conversion_load(const char *tree, int server_version,
										const char *using_expr, Oid root, Relation rel,
										Oid type, int32 typmod,
										AttrNumber target, List *settings,
										MemoryContext cxt);
extern void rm_conversion_prepare(RmConversion *conv, MemoryContext cxt);
extern Datum rm_conversion_evaluate(RmConversion *conv, TupleTableSlot *slot,
									bool *isnull);
extern bool rm_conversion_try(RmConversion *conv, TupleTableSlot *slot,
							  MemoryContext cxt, Datum *value, bool *isnull,
							  ErrorData **error);

extern bool rm_is_conversion_failure(int sqlerrcode);
extern ErrorData *rm_conversion_caught(MemoryContext cxt);
extern void rm_rethrow_explained(MemoryContext cxt, const char *text,
								 const char *detail, const char *hint);
extern Datum rm_settings_array(List *settings);
extern List *rm_settings_list(Datum array);
extern void rm_settings_apply(List *settings, int action);

#endif							/* RM_CONVERSION_H */
