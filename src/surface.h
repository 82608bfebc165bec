/*-------------------------------------------------------------------------
 *
 * surface.h
 *	  What the procedures of the surface share.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_SURFACE_H
#define RM_SURFACE_H

#include "fmgr.h"
#include "migration.h"

/* a column that changes besides the first one */
typedef struct RmColumnSpec
{
	const char *column;
	const char *new_type;
	const char *using_expr;		/* NULL: the assignment cast */
} RmColumnSpec;

/* what a migration is to do, as it was asked for */
typedef struct RmMigrationSpec
{
	const RmMethod *method;
	const char *method_reason;	/* why, where it was chosen for the user */
	Oid			relid;
	const char *column;			/* NULL: none, the table is only written anew */
	const char *new_type;
	const char *using_expr;		/* NULL: the assignment cast */
	List	   *further;		/* of RmColumnSpec */
	const char *new_column;		/* shadow column, NULL where there is none */
	const char *reverse_expr;	/* see RmMigration */
	const char *exact_check;
	const char *reverse_check;
	bool		null_on_error;

	/* how it is to be run, where all of its steps are: see steer.c */
	bool		all_steps;
	bool		manual_cut_over;
	bool		background;
	int			batch;
} RmMigrationSpec;

extern int64 rm_count_argument(FunctionCallInfo fcinfo, int arg, const char *name,
							   int64 min, int64 max);
extern char *rm_text_argument(FunctionCallInfo fcinfo, int arg, const char *name);
extern Oid	rm_find_relation(const char *name);
extern Relation rm_open_found(Oid relid);
extern char *rm_first_failure(Oid relid, const char *column,
							  const char *new_type, const char *using_expr,
							  ErrorData **error);
extern RmMigration *rm_migration_read(int64 id);
extern RmMigration *rm_migration_resolve(int64 id, MemoryContext cxt);
extern void rm_spec_use_method(RmMigrationSpec *spec, const RmMethod *method);
extern Relation rm_migration_open(const RmMigrationSpec *spec, List **columns);
extern RmMigration *rm_migration_plan(const RmMigrationSpec *spec, MemoryContext cxt);
extern RmMigration *rm_migration_create(const RmMigrationSpec *spec, MemoryContext cxt);
extern RmMigration *rm_migration_new(const RmMigrationSpec *spec);
extern void rm_migration_first_step(RmMigration *m, int batch);
extern RmMigration *rm_migration_start(const RmMigrationSpec *spec);
extern void rm_migration_revert(RmMigration *m, int to_steps);

#endif							/* RM_SURFACE_H */
