/*-------------------------------------------------------------------------
 *
 * definitions.h
 *	  Views, rules, policies and triggers on a column: dropped, and made again.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_DEFINITIONS_H
#define RM_DEFINITIONS_H

#include "migration.h"

extern List *rm_definitions_on(const RmMigration *m, List *attnums);
extern List *rm_relations_of_definitions(const RmMigration *m, List *attnums);
extern void rm_refuse_just_changed(const RmMigration *m);
extern void rm_definitions_drop(List *definitions);
extern void rm_definitions_make(List *definitions, List *copies);

#endif							/* RM_DEFINITIONS_H */
