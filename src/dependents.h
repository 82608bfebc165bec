/*-------------------------------------------------------------------------
 *
 * dependents.h
 *	  What hangs on the column that changes, and how it gets to another one.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_DEPENDENTS_H
#define RM_DEPENDENTS_H

#include "migration.h"

/* one thing that hangs on the column: a row of risky_migrations.dependent */
typedef struct RmDependent
{
	int			ord;			/* things come into force in this order */
	char	   *kind;
	char	   *name;			/* that it has in force */
	Oid			relid;			/* whose it is: the table, or one that refers to it */
	Oid			peer;			/* another relation that is concerned, or 0 */
	char	   *build_name;		/* while it waits; NULL: nothing is built */
	char	   *build_sql;		/* without a build_name: gives a row if it cannot be; "": comes with the parent's */
	bool		by_worker;		/* build_sql must be top-level */
	char	   *validate_sql;	/* NULL: not to be validated; likewise: when in force */
	char	   *make_sql;		/* in the exchange, before columns are renamed */
	List	   *take_sql;		/* of char *: puts it in force */
	char	   *drop_sql;		/* puts the one in force out of it, or NULL */
} RmDependent;

extern void rm_refuse_obstacles(const char *method, Oid relid, const char *columns);
extern void rm_dependents_refuse(Oid relid, AttrNumber attnum, Oid new_type,
								 bool publications);
extern List *rm_dependents_derive(const RmMigration *m, bool new_side,
								  MemoryContext cxt);
extern List *rm_dependents_add_members(const RmMigration *m, List *list,
									   MemoryContext cxt);
extern void rm_dependents_save(const RmMigration *m, bool new_side, List *list);
extern List *rm_dependents_load(const RmMigration *m, bool new_side,
								MemoryContext cxt);
extern List *rm_dependents_unchanged(List *before, List *now);
extern bool rm_dependents_equal(List *a, List *b);
extern bool rm_dependent_is_built(const RmMigration *m, const RmDependent *d,
								  bool *invalid, bool *unvalidated);
extern List *rm_dependents_leftovers(const RmMigration *m, bool new_side,
									 List *wanted);
extern List *rm_dependents_copies(const RmMigration *m, bool new_side);
extern List *rm_dependents_relations(const RmMigration *m, List *list);
extern void rm_name_not_null(const RmDependent *d, AttrNumber attnum);
extern void rm_swap_definers(const RmMigration *m);
extern void rm_mark_parts_proven(Oid referenced);
extern void rm_move_identity(Oid relid, AttrNumber from, AttrNumber to, Oid sequence);
extern char *rm_catalog_fingerprint(Oid relid, MemoryContext cxt);

#endif							/* RM_DEPENDENTS_H */
