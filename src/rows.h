/*-------------------------------------------------------------------------
 *
 * rows.h
 *	  Rows of a table, page by page, and a new value for one of them.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_ROWS_H
#define RM_ROWS_H

#include "access/tableam.h"
#include "migration.h"
#include "storage/buf.h"
#include "utils/snapshot.h"

/* what a transaction does to the rows */
typedef enum RmRowsMode
{
	RM_ROWS_READ,				/* nothing */
	RM_ROWS_ONE,				/* changes one, and may wait for it */
	RM_ROWS_MANY				/* changes many, and must not wait for any */
} RmRowsMode;

/* access to the rows of one table during one transaction */
typedef struct RmRows
{
	RmMigration *m;				/* with the numbers of rel's columns */
	Relation	rel;
	AttrNumber	target;			/* column that is written */
	RmConversion *conv;
	Snapshot	snapshot;
	EState	   *estate;
	ResultRelInfo *rri;
	TupleTableSlot *slot;		/* the row as it is */
	TupleTableSlot *new_slot;	/* the row as it will be */
	MemoryContext row_cxt;		/* reset for each row */
	Datum	   *values;
	bool	   *nulls;
	CommandId	cid;
	BlockNumber block;			/* of the row in slot */
	Oid			save_userid;	/* whom to be again */
	int			save_sec_context;
} RmRows;

extern RmRows *rm_rows_open(RmMigration *m, Relation rel, RmRowsMode mode);
extern void rm_rows_close(RmRows *rows);
extern int	rm_rows_on_page(RmRows *rows, Buffer buf, bool missing_only,
							OffsetNumber *offsets, int *dead);
extern void rm_row_get(RmRows *rows, Buffer buf, OffsetNumber offset);
extern bool rm_row_get_tid(RmRows *rows, ItemPointer tid);
extern Datum rm_row_target(RmRows *rows, bool *isnull);
extern Size rm_row_make(RmRows *rows, Datum value, bool isnull);
extern TM_Result rm_row_store(RmRows *rows, bool wait, bool *hot);
extern bool rm_row_convert(RmRows *rows, bool careful, Datum *value, bool *isnull,
						   ErrorData **error);
extern void rm_row_record_failure(RmRows *rows, ErrorData *error);
extern char *rm_row_value(RmRows *rows);
extern char *rm_row_key(Relation rel, TupleTableSlot *slot);

#endif							/* RM_ROWS_H */
