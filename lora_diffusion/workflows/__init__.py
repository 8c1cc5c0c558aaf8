"""Whole commands, one file for each verb, named as the command. They wire objects together and decide nothing."""
