/*-------------------------------------------------------------------------
 *
 * steer.h
 *	  Whole migrations, in the foreground and the background, and steering.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_STEER_H
#define RM_STEER_H

#include "migration.h"
#include "surface.h"

/* for the runner */
extern void rm_steer_begin(int64 id);
extern RmWanted rm_steer_wanted(RmRun *run);
extern bool rm_steer_interrupted(RmRun *run, ErrorData *error);
extern ErrorData *rm_steer_obey(RmRun *run);

/* for whoever starts one */
extern void rm_steer_order(const RmMigration *m, const RmMigrationSpec *spec);
extern bool rm_steer_launch(int64 id, Oid session_user, TransactionId starter,
							const char *what);
extern bool rm_steer_has_next_step(const char *method, int steps_done,
								   bool manual_cut_over);

/* launcher.c */
extern void rm_launcher_init(void);

#endif							/* RM_STEER_H */
