/*-------------------------------------------------------------------------
 *
 * steps.h
 *	  The steps of the methods, and what they share.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_STEPS_H
#define RM_STEPS_H

#include "migration.h"

extern const RmStep rm_step_alter_type;
extern const RmStep rm_step_add_column;
extern const RmStep rm_step_backfill;
extern const RmStep rm_step_enforce_not_null;
extern const RmStep rm_step_build;
extern const RmStep rm_step_swap;
extern const RmStep rm_step_cleanup;

/* direct.c */
extern void rm_direct_refuse_inexact(const RmMigration *m);

/* backfill.c */
extern void rm_backfill_fix_end(RmMigration *m, Relation rel);
extern void rm_forget_skipped_rows(const RmMigration *m);

/* three_step.c */
/* enforce_not_null: leaves have come since all were verified; a phase in the state row */
#define RM_PHASE_LATE_LEAVES	5

extern RmStepResult rm_backfill_revert(RmRun *run);
extern void rm_forget_rows(RmMigration *m);
extern void rm_three_step_refuse(Relation rel, const RmConversionDef *def,
								 const char *new_column);
extern bool rm_is_not_null(Oid relid, AttrNumber attnum);
extern void rm_refuse_child(Relation child, Oid root, const char *column);
extern void rm_sync_trigger_make(const RmMigration *m, Oid relid);
extern void rm_drop_trigger_and_column(const RmMigration *m, AttrNumber attnum);
extern char *rm_shadow_column_name(const char *column);
extern char *rm_old_column_name(const char *column);

/* swap.c */
typedef struct RmExchange RmExchange;

extern RmExchange *rm_swap_to_be_rehearsed(RmMigration *m);
extern void rm_swap_rehearse(RmRun *run, RmExchange *e);
extern void rm_swap_names(const RmMigration *m, bool forward);
extern void rm_bind_shadow_column(const RmMigration *m);
extern void rm_release_shadow_column(const RmMigration *m);

/* surface.c */
extern void rm_format_count(char *buf, Size size, int64 n);

#endif							/* RM_STEPS_H */
