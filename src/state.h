/*-------------------------------------------------------------------------
 *
 * state.h
 *	  Access to the extension's own tables (schema risky_migrations).
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_STATE_H
#define RM_STATE_H

#include "nodes/pg_list.h"
#include "utils/relcache.h"

#define RM_SCHEMA "risky_migrations"

/*
 * OID of the extension's table of that name.  Raises 3F000/42P01 with a hint
 * if the extension is not installed in this database (only then missing_ok
 * returns InvalidOid).
 */
extern Oid	rm_state_relid(const char *relname, bool missing_ok);

/* the role that owns the extension's tables */
extern Oid	rm_state_owner(void);

/*
 * Runs one SQL command on the extension's own tables through SPI, as their
 * owner and with search_path pinned to pg_catalog, whoever the caller is.
 * Needs a transaction and an SPI connection of the caller (the result is left
 * in SPI_tuptable and SPI_processed).  Errors are those of the command; an
 * unexpected SPI code is raised as XX000.
 *
 * nulls is as SPI has it ('n' for NULL), or NULL for none.
 */
extern void rm_state_execute(const char *sql, int nargs, Oid *argtypes,
							 Datum *values, const char *nulls);

/*
 * Runs one query over the catalogs, usually one of the extension's functions that
 * read them, through SPI as the current role and with the current search_path.
 * Needs what rm_state_execute needs, and leaves its result there; the memory context
 * stays the caller's.
 *
 * What others drop is found by the query's snapshot, and then not by PostgreSQL's
 * functions that describe it (pg_get_viewdef() waits for the lock of who drops a view):
 * they fail with XX000.  It is asked again then.
 */
extern void rm_catalog_query(const char *sql, int nargs, Oid *argtypes, Datum *values);

/* int2[] of a list of integers */
extern Datum rm_attnum_array(List *attnums);

/* the values, n of them, as a bigint[] */
extern Datum rm_int64_array(Datum *values, int n);

/* fields of the current SPI_tuptable; row and column count from 0 and 1 */
extern bool rm_result_isnull(int row, int col);
extern Datum rm_result_datum(int row, int col);
extern char *rm_result_text(int row, int col);	/* palloc'd or NULL */
extern int64 rm_result_int64(int row, int col); /* 0 for NULL */

#endif							/* RM_STATE_H */
