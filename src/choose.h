/*-------------------------------------------------------------------------
 *
 * choose.h
 *	  What plain ALTER TABLE would do, and which method is the right one.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_CHOOSE_H
#define RM_CHOOSE_H

#include "surface.h"

extern void rm_choose_method(RmMigrationSpec *spec, MemoryContext cxt);

#endif							/* RM_CHOOSE_H */
