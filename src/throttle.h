/*-------------------------------------------------------------------------
 *
 * throttle.h
 *	  Holding a migration back for the sake of others.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_THROTTLE_H
#define RM_THROTTLE_H

#include "migration.h"

extern void rm_throttle_init(void);
extern ErrorData *rm_throttle(RmRun *run);
extern ErrorData *rm_throttle_reload(RmRun *run);
extern ErrorData *rm_throttle_wraparound(RmRun *run);
extern void rm_throttle_aside_begins(RmRun *run);
extern bool rm_throttle_aside_unwanted(RmRun *run);
extern void rm_throttle_aside_ends(RmRun *run);
extern void rm_throttle_look_at_wal(void);
extern void rm_throttle_building(void);
extern const char *rm_batch_pause_reason(const RmRun *run);

#endif							/* RM_THROTTLE_H */
