/*-------------------------------------------------------------------------
 *
 * twin.h
 *	  A table's twin: an empty copy, on which PostgreSQL shows what it would do.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_TWIN_H
#define RM_TWIN_H

#include "postgres.h"

/* lives in the memory context of whoever made it */
typedef struct RmTwin
{
	Oid			relid;
	const char *sql;			/* its qualified name */
} RmTwin;

extern const char *rm_twin_schema(Oid relid);
extern RmTwin rm_twin_make(Oid relid, const char *schema, const char *name,
						   const char *prefix);
extern void rm_twin_alter(const RmTwin *twin, const char *clauses);

#endif							/* RM_TWIN_H */
